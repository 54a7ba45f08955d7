"""One training step and one validation step: pure functions, compiled once for the shapes of a
stage."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Float
from alignvlm_jax.train import optim, state
from alignvlm_jax.train.state import Params, TrainState

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Mapping[str, Array]], Metrics]


def select(
    config: Config, batch: Mapping[str, Array], *, measure_patches: bool
) -> dict[str, Array]:
    """Returns the arrays of a batch that a step looks at, so that the others are never sent to a
    device.

    With visual_source "labels" the labels are the input and no pixel is; with pixels, labels serve
    the patch loss alone.
    """
    unused: set[str] = set()
    if config.train.visual_source == "oracle":
        unused |= {"tiles", "patch_loss_weights"}
    elif not measure_patches:
        unused |= {"patch_label_ids", "patch_label_weights", "patch_loss_weights"}
    return {name: array for name, array in batch.items() if name not in unused}


def train_inputs(config: Config, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Returns what the training step takes of a batch; the patch loss is left out where it has no
    weight."""
    return select(config, batch, measure_patches=config.train.patch_token_weight > 0)


def eval_inputs(config: Config, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Returns what the validation step takes of a batch; the patch loss is measured whether trained
    or not."""
    return select(config, batch, measure_patches=True)


def make_train_step(model: vlm.VLM, config: Config, tx: optax.GradientTransformation) -> TrainStep:
    """Returns step(state, batch) -> (state, metrics).

    Loss = answer_loss + patch_token_weight * patch_loss + z_loss * (mean of log_sum_exp squared),
    each a sum divided once by its weight in the whole batch, so that neither accumulation nor
    sharding changes it. Only the stage's trainable parameters get gradients. Where the gradient's
    norm is not finite the step changes nothing but the step count.
    """
    schedule = optim.make_schedule(config)

    def train_step(old: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, Metrics]:
        trainable, frozen = state.split(old.params, state.trainable_paths(config, old.params))
        weights = _weights(batch)

        def loss_fn(trainable: Params, microbatch: Mapping[str, Array]) -> tuple[Array, Metrics]:
            sums = _sums(model, config, state.merge(trainable, frozen), microbatch)
            return _total(config, means(sums | weights)), sums

        def add_microbatch(
            total: Params, microbatch: Mapping[str, Array]
        ) -> tuple[Params, Metrics]:
            grads, sums = jax.grad(loss_fn, has_aux=True)(trainable, microbatch)
            return jax.tree.map(jnp.add, total, grads), sums

        microbatches = _split_microbatches(batch, config.train.grad_accum_steps)
        grads, sums = jax.lax.scan(
            add_microbatch, jax.tree.map(jnp.zeros_like, trainable), microbatches
        )
        sums = jax.tree.map(lambda x: x.sum(0), sums)

        grad_norm = optax.global_norm(grads)
        updates, opt_state = tx.update(grads, old.opt_state, trainable)
        updated = optax.apply_updates(trainable, updates), opt_state
        trainable, opt_state = jax.tree.map(
            lambda new, kept: jnp.where(jnp.isfinite(grad_norm), new, kept),
            updated,
            (trainable, old.opt_state),
        )
        metrics = means(sums | weights)
        loss = _total(config, metrics)
        if "patch_loss" in metrics:
            # Of a batch without a labelled patch it is unknown: a 0 would enter the means that are
            # logged.
            metrics["patch_loss"] = jnp.where(
                weights["patch_weight"] > 0, metrics["patch_loss"], jnp.nan
            )
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(optim.num_updates(old.opt_state)),
            "num_updates": optim.num_updates(opt_state),
        }
        return TrainState(old.step + 1, state.merge(trainable, frozen), opt_state), metrics

    return train_step


def make_eval_step(model: vlm.VLM, config: Config) -> EvalStep:
    """Returns step(params, batch) -> sums and weights of the batch; add them over batches, then
    take `means`."""

    def eval_step(params: Params, batch: Mapping[str, Array]) -> Metrics:
        return _sums(model, config, params, batch) | _weights(batch)

    return eval_step


def whole_loss(
    model: vlm.VLM, config: Config, params: Params, batch: Mapping[str, Array]
) -> Float[Array, ""]:
    """Returns the loss of a batch without gradient accumulation: what a training step minimises."""
    return _total(config, means(_sums(model, config, params, batch) | _weights(batch)))


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
    not a slow step. The validation step takes `validation_batch_size` rows.
    """
    lowered = (
        lower_train_step(model, config, tx, abstract, mesh),
        _lower_eval_step(model, config, abstract, mesh),
    )
    # Tracing needs the mesh, which is this thread's; XLA's work, most of the time, does not.
    with ThreadPoolExecutor(len(lowered)) as pool:
        train_step, eval_step = pool.map(jax.stages.Lowered.compile, lowered)
    return train_step, eval_step


def validation_batch_size(config: Config) -> int:
    """Rows of a validation batch: those of one accumulation part, which are known to fit."""
    return config.train.batch_size // config.train.grad_accum_steps


def means(sums: Mapping[str, Array]) -> dict[str, Array]:
    """Divides sums by their weights; 0 where there is no weight. Takes jax arrays or numbers."""

    def ratio(name: str, weight: str) -> Array:
        return sums[name] / (sums[weight] + (sums[weight] == 0))

    result = {
        "answer_loss": ratio("answer_sum", "answer_weight"),
        "token_accuracy": ratio("correct_sum", "answer_weight"),
    }
    if "patch_sum" in sums:
        result["patch_loss"] = ratio("patch_sum", "patch_weight")
    if "z_sum" in sums:
        result["z_loss"] = ratio("z_sum", "answer_weight")
    return result


def _total(config: Config, losses: Metrics) -> Array:
    return (
        losses["answer_loss"]
        + config.train.patch_token_weight * losses.get("patch_loss", 0.0)
        + config.train.z_loss * losses.get("z_loss", 0.0)
    )


def _sums(model: vlm.VLM, config: Config, params: Params, batch: Mapping[str, Array]) -> Metrics:
    """Weighted sums over a batch: answer loss, right answer tokens, and the patch loss where it is
    measured."""
    tokens, patch_nll = model.apply(
        {"params": params}, batch, visual_source=config.train.visual_source, method=vlm.VLM.losses
    )
    weights = batch["loss_weights"]
    sums = {
        "answer_sum": jnp.sum(tokens.nll * weights),
        "correct_sum": jnp.sum(tokens.is_correct * weights),
    }
    if config.train.z_loss:
        sums["z_sum"] = jnp.sum(jnp.square(tokens.log_sum_exp) * weights)
    if "patch_loss_weights" in batch:
        sums["patch_sum"] = jnp.sum(patch_nll * batch["patch_loss_weights"])
    return sums


def _weights(batch: Mapping[str, Array]) -> Metrics:
    weights = {"answer_weight": batch["loss_weights"].sum()}
    if "patch_loss_weights" in batch:
        weights["patch_weight"] = batch["patch_loss_weights"].sum()
    return weights


def _split_microbatches(batch: Mapping[str, Array], num_microbatches: int) -> dict[str, Array]:
    """[B, ...] to [parts, B / parts, ...]; each part takes every n-th row, so that rows stay on
    their devices."""

    def split(x: Array) -> Array:
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
    batch = _abstract_batch(
        train_inputs(config, vlm.abstract_batch(config)), config.train.batch_size, mesh
    )
    shardings = state.shardings_of(abstract)
    step = jax.jit(
        make_train_step(model, config, tx),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return step.lower(abstract, batch)


def _lower_eval_step(
    model: vlm.VLM, config: Config, abstract: TrainState, mesh: Mesh
) -> jax.stages.Lowered:
    batch = _abstract_batch(
        eval_inputs(config, vlm.abstract_batch(config)), validation_batch_size(config), mesh
    )
    step = jax.jit(
        make_eval_step(model, config),
        in_shardings=(state.shardings_of(abstract.params), sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
    return step.lower(abstract.params, batch)


def _abstract_batch(
    batch: Mapping[str, jax.ShapeDtypeStruct], rows: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    batch_sharding = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=batch_sharding)
        for name, x in batch.items()
    }
