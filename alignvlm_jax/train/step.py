"""One training step and one validation step: pure functions, compiled once for the shapes of a
stage."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import ArrayLike

from alignvlm_jax.config import Config, DataConfig, TrainConfig
from alignvlm_jax.models import layers, vlm
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Float, Int
from alignvlm_jax.train import lora, optim, state
from alignvlm_jax.train.state import Params, TrainState

Metrics = dict[str, Float[Array, ""] | Int[Array, ""]]
TrainStep = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, Metrics]]
# An array, or its shape alone: what a step takes of a batch is chosen by name.
Shaped = TypeVar("Shaped", jax.Array, np.ndarray, jax.ShapeDtypeStruct)
EvalStep = Callable[[Params, Mapping[str, Array]], Metrics]


def select(
    train: TrainConfig, batch: Mapping[str, Shaped], *, measure_patches: bool
) -> dict[str, Shaped]:
    """Returns the arrays of a batch that a step looks at, so that the others are never sent to a
    device.

    With visual_source "oracle" the labels are the input and no pixel is; with pixels, labels serve
    the patch loss alone. With answer_weight 0 that is all there is, and text has no use.
    """
    unused: set[str] = set()
    if not train.answer_weight:
        unused |= {"tokens", "targets", "loss_weights", "positions", "segment_ids", "kept_patches"}
    if train.visual_source == "oracle":
        unused |= {"tiles", "patch_loss_weights"}
    elif not measure_patches:
        unused |= {"patch_label_ids", "patch_label_weights", "patch_loss_weights"}
    return {name: array for name, array in batch.items() if name not in unused}


def train_inputs(train: TrainConfig, batch: Mapping[str, Shaped]) -> dict[str, Shaped]:
    """Returns what the training step takes of a batch; the patch loss is left out where it has no
    weight."""
    return select(train, batch, measure_patches=train.patch_token_weight > 0)


def eval_inputs(train: TrainConfig, batch: Mapping[str, Shaped]) -> dict[str, Shaped]:
    """Returns what the validation step takes of a batch; the patch loss is measured whether trained
    or not."""
    return select(train, batch, measure_patches=True)


def make_train_step(
    model: vlm.VLM,
    train: TrainConfig,
    trainable: set[str],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    lora_alpha: float | None = None,
) -> TrainStep:
    """Returns step(state, batch) -> (state, metrics).

    Loss = answer_weight * answer_loss + patch_token_weight * patch_loss + z_loss * (mean of
    log_sum_exp squared), each a sum divided once by its weight in the whole batch, so that neither
    microbatches nor sharding changes it. With answer_weight 0 the LLM is not run. Only the
    parameters at the paths `trainable` get gradients. Where the gradient's norm is not finite the
    step changes nothing but the step count.

    Args:
      tx: the optimizer, whose state covers what is trained alone.
      schedule: the learning rate by the number of updates, for the metrics; `tx` has its own.
      lora_alpha: of `config.LoraConfig`; must be given where parameters have factors.
    """

    def train_step(old: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, Metrics]:
        if train.offload_optimizer:
            old = old.replace(opt_state=_moved(old.opt_state, jax.memory.Space.Device))
        # Frozen parameters come into the loss from outside: no gradient of theirs is ever made.
        trained, frozen = state.split(old.params, trainable)
        # Of the whole batch: what a microbatch's sums are divided by must not depend on the split.
        weights = _weights(batch)

        def loss_fn(
            trained: Params, microbatch: Mapping[str, Array]
        ) -> tuple[Float[Array, ""], Metrics]:
            params = effective_params(model, state.merge(trained, frozen), lora_alpha)
            with layers.gradients_reduced_in(train.grad_reduce_dtype):
                sums = _sums(model, train, params, microbatch)
            return _total(train, means(sums | weights)), sums

        def add_microbatch(
            total: Params, microbatch: Mapping[str, Array]
        ) -> tuple[Params, Metrics]:
            # Each loss is divided by the weights of the whole batch: the gradients add up to the
            # batch's own.
            grads, sums = jax.grad(loss_fn, has_aux=True)(trained, microbatch)
            return jax.tree.map(jnp.add, total, grads), sums

        # [B, ...] -> [n, B / n, ...]: a scan over n holds the activations of one microbatch at a
        # time.
        microbatches = _split_microbatches(batch, train.grad_accum_steps)
        # Summed as trained parameters are, in float32, whatever the model computes in.
        zeros = jax.tree.map(jnp.zeros_like, trained)
        grads, sums = jax.lax.scan(add_microbatch, zeros, microbatches)
        # The scan stacks the sums of the microbatches: [n] -> [].
        sums = jax.tree.map(lambda x: x.sum(0), sums)

        # Before clipping, which is the optimizer's: one NaN in any gradient makes the norm NaN.
        grad_norm = optax.global_norm(grads)
        updates, opt_state = tx.update(grads, old.opt_state, trained)
        updated = optax.apply_updates(trained, updates), opt_state
        # Chosen on the device and without a branch: the host learns of a skipped step only one step
        # later. All processes see one norm, that of all shards, and so choose alike.
        trained, opt_state = jax.tree.map(
            lambda new, kept: jnp.where(jnp.isfinite(grad_norm), new, kept),
            updated,
            (trained, old.opt_state),
        )
        if train.offload_optimizer:
            opt_state = _moved(opt_state, jax.memory.Space.Host)
        metrics = means(sums | weights)
        loss = _total(train, metrics)
        if "patch_loss" in metrics:
            # Of a batch without a labelled patch it is unknown: a 0 would enter the means that are
            # logged.
            metrics["patch_loss"] = jnp.where(
                weights["patch_weight"] > 0, metrics["patch_loss"], jnp.nan
            )
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            # Of the count before the update, by which `tx` has just made it.
            "learning_rate": schedule(optim.num_updates(old.opt_state)),
            "num_updates": optim.num_updates(opt_state),
        }
        return TrainState(old.step + 1, state.merge(trained, frozen), opt_state), metrics

    return train_step


def _moved(opt_state: optax.OptState, space: jax.memory.Space) -> optax.OptState:
    """Moves all but counts to the memory of the host or of the device."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)


def make_eval_step(model: vlm.VLM, train: TrainConfig) -> EvalStep:
    """Returns step(params, batch) -> sums and weights of the batch; add them over batches, then
    take `means`."""

    # Measured over the whole vocabulary, however it is trained.
    train = dataclasses.replace(train, sampled_entries=0)

    def eval_step(params: Params, batch: Mapping[str, Array]) -> Metrics:
        return _sums(model, train, params, batch) | _weights(batch)

    return eval_step


def effective_params(model: vlm.VLM, params: Params, lora_alpha: float | None) -> Params:
    """Returns the parameters that the model computes with: those of the state, factors of LoRA
    merged into their kernels."""
    # In the type that the kernel would be cast to at its use: half the memory in bfloat16.
    return lora.merged(params, lora_alpha, model.config, model.config.dtype)


def whole_loss(
    model: vlm.VLM,
    train: TrainConfig,
    params: Params,
    batch: Mapping[str, Array],
    lora_alpha: float | None = None,
) -> Float[Array, ""]:
    """Returns the loss of a batch that is one microbatch: what a training step minimises."""
    params = effective_params(model, params, lora_alpha)
    return _total(train, means(_sums(model, train, params, batch) | _weights(batch)))


def compile_steps(
    model: vlm.VLM,
    config: Config,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
) -> tuple[TrainStep, EvalStep]:
    """Compiles both steps ahead of time, side by side; the training step's first argument is
    donated.

    What comes back cannot be traced again: a batch or state of other shapes or dtypes is an error,
    not a slow step. The validation step takes `validation_batch_size` sequences. With `train.jit`
    off both come back as they are, and every operation runs by itself.
    """
    train = config.train
    if not train.jit:
        trainable = state.trainable_paths(train, config.stage, abstract.params)
        schedule = optim.make_schedule(config.optim, train.num_steps)
        train_step = make_train_step(model, train, trainable, tx, schedule, config.lora.alpha)
        return _eager(train_step), _eager(make_eval_step(model, train))
    merged = state.abstract_merged(abstract.params, model.config)
    lowered = (
        lower_train_step(model, config, tx, abstract, mesh),
        _lower_eval_step(model, config.data, train, merged, mesh),
    )
    # Tracing needs the mesh, which is this thread's; XLA's work, most of the time, does not.
    with ThreadPoolExecutor(len(lowered)) as pool:
        train_step, eval_step = pool.map(jax.stages.Lowered.compile, lowered)
    return train_step, eval_step


def _eager(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step whose operations run one by one, so that arrays in it have values."""

    @functools.wraps(step)
    def run(*args: Any) -> Any:
        # Constants go to the device with each operation, which the guard of the loop forbids.
        with jax.transfer_guard("allow"), jax.disable_jit():
            return step(*args)

    return run


def validation_batch_size(train: TrainConfig) -> int:
    """Returns the sequences of a validation batch: those of a microbatch, which are known to
    fit."""
    return train.batch_size // train.grad_accum_steps


def means(sums: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """Divides the sums that there are by their weights; 0 where there is no weight. Takes jax
    arrays or numbers."""

    def ratio(name: str, weight: str) -> ArrayLike:
        # 0 / 0 becomes 0 / 1. A `where` around the division would not do: its gradient would still
        # be NaN.
        return sums[name] / (sums[weight] + (sums[weight] == 0))

    result = {}
    if "answer_sum" in sums:
        result["answer_loss"] = ratio("answer_sum", "answer_weight")
        result["token_accuracy"] = ratio("correct_sum", "answer_weight")
    if "patch_sum" in sums:
        result["patch_loss"] = ratio("patch_sum", "patch_weight")
    if "z_sum" in sums:
        result["z_loss"] = ratio("z_sum", "answer_weight")
    return result


def _total(train: TrainConfig, losses: Metrics) -> Float[Array, ""]:
    return (
        train.answer_weight * losses.get("answer_loss", 0.0)
        + train.patch_token_weight * losses.get("patch_loss", 0.0)
        + train.z_loss * losses.get("z_loss", 0.0)
    )


def _sums(
    model: vlm.VLM, train: TrainConfig, params: Params, batch: Mapping[str, Array]
) -> Metrics:
    """Weighted sums over a batch: answer loss and right answer tokens where they count, and the
    patch loss where it is measured."""
    if not train.answer_weight:
        patch_nll = model.apply(
            {"params": params}, batch, train.sampled_entries, method=vlm.VLM.patch_losses
        )
        return {"patch_sum": jnp.sum(patch_nll * batch["patch_loss_weights"])}
    tokens, patch_nll = model.apply(
        {"params": params}, batch, visual_source=train.visual_source, method=vlm.VLM.losses
    )
    # 0 on questions, image tokens and padding: their losses are computed and do not count.
    weights = batch["loss_weights"]
    sums = {
        "answer_sum": jnp.sum(tokens.nll * weights),
        "correct_sum": jnp.sum(tokens.is_correct * weights),
    }
    if train.z_loss:
        sums["z_sum"] = jnp.sum(jnp.square(tokens.log_sum_exp) * weights)
    if "patch_loss_weights" in batch:
        sums["patch_sum"] = jnp.sum(patch_nll * batch["patch_loss_weights"])
    return sums


def _weights(batch: Mapping[str, Array]) -> Metrics:
    weights = {}
    if "loss_weights" in batch:
        weights["answer_weight"] = batch["loss_weights"].sum()
    if "patch_loss_weights" in batch:
        weights["patch_weight"] = batch["patch_loss_weights"].sum()
    return weights


def _split_microbatches(batch: Mapping[str, Array], num_microbatches: int) -> dict[str, Array]:
    """[B, ...] to [n, B / n, ...] of n microbatches; each takes every n-th sequence.

    Cut into runs of B / n sequences, a microbatch would lie on one n-th of the devices, and all of
    it would have to be sent around; so each device gives each microbatch some of its own.
    """

    def split(x: Array) -> Array:
        # [B, ...] -> [B / n, n, ...] -> [n, B / n, ...]
        x = x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
        return nn.with_logical_constraint(x, (None, "act_batch", *(None,) * (x.ndim - 2)))

    return {name: split(x) for name, x in batch.items()}


def lower_train_step(
    model: vlm.VLM,
    config: Config,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
) -> jax.stages.Lowered:
    """Traces the training step for the mesh entered; to be compiled, and for a machine that is not
    this one, too."""
    train = config.train
    batch = vlm.abstract_batch(config.model, config.data, train.batch_size)
    trainable = state.trainable_paths(train, config.stage, abstract.params)
    schedule = optim.make_schedule(config.optim, train.num_steps)
    shardings = state.shardings_of(abstract)
    step = jax.jit(
        make_train_step(model, train, trainable, tx, schedule, config.lora.alpha),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        # Stated, not left to the partitioner: a donated buffer is used again only for an output of
        # the same sharding, and the state of one step is the argument of the next.
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return step.lower(abstract, _sharded(train_inputs(train, batch), mesh))


def _lower_eval_step(
    model: vlm.VLM, data: DataConfig, train: TrainConfig, params: Params, mesh: Mesh
) -> jax.stages.Lowered:
    batch = vlm.abstract_batch(model.config, data, validation_batch_size(train))
    step = jax.jit(
        make_eval_step(model, train),
        # Nothing is donated: training goes on with the parameters.
        in_shardings=(state.shardings_of(params), sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
    return step.lower(params, _sharded(eval_inputs(train, batch), mesh))


def _sharded(
    batch: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    sequences = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sequences)
        for name, x in batch.items()
    }
