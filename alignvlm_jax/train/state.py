"""The training state: what is in it, how it is created on a mesh, and which parameters a stage
trains.

Parameters are plain nested dicts; a path is the "/"-joined keys of a leaf, such as
`vision/blocks/attn/q/kernel`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct, traverse_util
from jax.sharding import Mesh

from alignvlm_jax.config import LoraConfig, ModelConfig, TrainConfig
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Int
from alignvlm_jax.train import lora as lora_lib

Params = dict[str, Any]
HOST_MEMORY = "pinned_host"
"""The kind of memory, by jax's name, in which an offloaded optimizer state lies."""


class TrainState(struct.PyTreeNode):
    """What a step changes.

    `step` counts over all stages; `opt_state` covers the stage's trainable parameters only.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def flatten(params: Params) -> dict[str, Any]:
    """Returns leaves by path, in the tree's order; a logical box counts as a leaf."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def match_paths(patterns: Iterable[str], paths: Iterable[str], field: str) -> set[str]:
    """Returns the paths that one of `patterns` matches whole (`re.fullmatch`).

    Raises:
      UserError: a pattern that is no regular expression or matches nothing; it would otherwise pass
        unseen.
    """
    paths = list(paths)
    chosen = set()
    for pattern in patterns:
        try:
            matched = {path for path in paths if re.fullmatch(pattern, path)}
        except re.error as err:
            raise UserError(
                f"config.{field} {pattern!r} is not a regular expression: {err}"
            ) from err
        if not matched:
            raise UserError(
                f"config.{field} {pattern!r} matches no parameter{_nearest_path(pattern, paths)}"
            )
        chosen |= matched
    return chosen


def split(params: Params, chosen: set[str]) -> tuple[Params, Params]:
    """Returns the parameters whose path is in `chosen`, and the others."""
    leaves = flatten(params)
    return tuple(
        unflatten({p: x for p, x in leaves.items() if (p in chosen) is take})
        for take in (True, False)
    )


def merge(first: Params, second: Params) -> Params:
    """The inverse of `split`."""
    return unflatten(flatten(first) | flatten(second))


def trainable_paths(train: TrainConfig, stage: str, params: Params) -> set[str]:
    """Returns the paths that the stage of the name `stage` trains; factors of LoRA are among them.

    Raises:
      UserError: a pattern, or all of them, match none; or one matches what has to be frozen.
    """
    chosen = _matched(train, params)
    if not chosen:
        raise UserError(
            f"config.train.trainable is empty in stage {stage!r}: nothing would be trained"
        )
    if without := sorted(path for path in chosen if _has_no_gradient(train, path)):
        loss = (
            "config.train.visual_source 'oracle' reads no image"
            if train.answer_weight
            else "config.train.answer_weight 0 leaves out the language model"
        )
        raise UserError(
            f"config.train.trainable or config.lora.targets matches {without[0]} in stage "
            f"{stage!r}, which gets no gradient, and would decay: {loss}; name what is trained, "
            "such as " + ("'llm/.*'" if train.answer_weight else "'vision/.*' and 'connector/.*'")
        )
    return chosen


def _has_no_gradient(train: TrainConfig, path: str) -> bool:
    """Whether nothing that the stage computes depends on the parameter."""
    # Factors lie beside the components: lora/llm/...
    is_llm = path.removeprefix(f"{lora_lib.COMPONENT}/").startswith("llm/")
    if not train.answer_weight:
        return is_llm
    return train.visual_source == "oracle" and not is_llm


def _matched(train: TrainConfig, params: Params) -> set[str]:
    paths = flatten(params).keys()
    chosen = match_paths(train.trainable, paths, "train.trainable")
    if both := sorted(chosen & lora_lib.kernels(paths)):
        raise UserError(
            f"config.train.trainable matches {both[0]}, and so does config.lora.targets, by which "
            f"it stays as it is and gets factors; {_in_one(both[0])}"
        )
    if both := sorted(chosen & _bfloat16_paths(train, paths)):
        raise UserError(
            f"config.train.trainable matches {both[0]}, and so does config.train.bfloat16_params, "
            f"where updates would be rounded away; {_in_one(both[0])}"
        )
    return chosen | {path for path in paths if lora_lib.is_factor(path)}


def _in_one(path: str) -> str:
    """What to do about a path that both `train.trainable` and another field match."""
    usual = "" if path.startswith("connector/") else ", such as trainable, by naming 'connector/.*'"
    return f"leave it out of one of the two{usual}"


def _bfloat16_paths(train: TrainConfig, paths: Iterable[str]) -> set[str]:
    own = [path for path in paths if not lora_lib.is_factor(path)]
    return match_paths(train.bfloat16_params, own, "train.bfloat16_params")


def abstract_state(
    model: vlm.VLM,
    train: TrainConfig,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    lora: LoraConfig = lora_lib.OFF,
) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, with optimizer state for what is trained
    alone: of the host's memory with `train.offload_optimizer`. Nothing is computed."""

    def boxed_state() -> TrainState:
        params = _boxed_params(model, train, lora)
        trainable, _ = split(params, _matched(train, params))
        return TrainState(jnp.zeros((), jnp.int32), params, _boxed_opt_state(tx, trainable))

    abstract = _with_shardings(boxed_state, mesh)
    if not train.offload_optimizer:
        return abstract
    return abstract.replace(opt_state=jax.tree.map(_on_host, abstract.opt_state))


def _on_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The array in the host's memory; counts stay where they are."""
    return x.update(sharding=x.sharding.with_memory_kind(HOST_MEMORY)) if x.ndim else x


def abstract_params(
    model: vlm.VLM,
    mesh: Mesh,
    train: TrainConfig | None = None,
    lora: LoraConfig = lora_lib.OFF,
) -> Params:
    """Returns the parameters' shapes, dtypes and shardings, whatever is trained; float32 without
    the stage's `train`."""
    return _with_shardings(lambda: _boxed_params(model, train, lora), mesh)


def abstract_merged(abstract: Params, model: ModelConfig) -> Params:
    """Returns the shapes, dtypes and shardings of what `lora.merge` makes of the parameters
    `abstract`."""
    leaves = flatten(abstract)
    with_factors = lora_lib.kernels(leaves)
    return unflatten(
        {
            path: x.update(dtype=lora_lib.merged_dtype(x.dtype, model))
            if path in with_factors
            else x
            for path, x in leaves.items()
            if not lora_lib.is_factor(path)
        }
    )


def _boxed_params(model: vlm.VLM, train: TrainConfig | None, lora: LoraConfig) -> Params:
    """The parameters of a stage, boxed with their logical axes; for their shapes alone."""
    # Any key would do, since nothing is drawn.
    leaves = flatten(vlm.init_params(model, jax.random.key(0)))
    for path in _bfloat16_paths(train, leaves) if train else ():
        leaves[path] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), leaves[path])
    params = unflatten(leaves)
    if not lora.rank:
        return params
    targets = match_paths(lora.targets, leaves, "lora.targets")
    shapes = {path: nn.meta.unbox(leaves[path]).shape for path in targets}
    lora_lib.check_targets(model.config, lora.rank, shapes)
    return lora_lib.add(params, targets, lora.rank, model.config)


def _boxed_opt_state(tx: optax.GradientTransformation, boxed: Params) -> optax.OptState:
    """The initial optimizer state of parameters that are boxed with their logical axes, boxed with
    those that each of its arrays has of its parameter's."""
    by_path = flatten(boxed)

    def box(path: tuple, x: Array) -> Any:
        # The optimizer's own containers have no string keys: what is left is the parameter's path.
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        param = by_path.get("/".join(keys))
        if not isinstance(param, nn.LogicallyPartitioned):
            return x
        axes = _axes_left(param.value.shape, x.shape)
        return (
            x if axes is None else nn.LogicallyPartitioned(x, tuple(param.names[i] for i in axes))
        )

    return jax.tree_util.tree_map_with_path(box, tx.init(sharding.unbox(boxed)))


def _axes_left(shape: tuple[int, ...], left: tuple[int, ...]) -> list[int] | None:
    """Returns the axes of an array of `shape` that one of the shape `left` has, which may lack an
    axis, as means over rows do; None where it lacks more."""
    axes = list(range(len(shape)))
    kept = [axes, *(axes[:i] + axes[i + 1 :] for i in axes)]
    return next((one for one in kept if tuple(shape[i] for i in one) == left), None)


def init_params(model: vlm.VLM, abstract: Params, paths: set[str], rng: Array) -> Params:
    """Returns those of the parameters `abstract` that are at `paths`, initialised, each shard on
    its own device.

    The others are never made: XLA drops them.
    """
    # The same numbers, compiled in two thirds of the time.
    model = vlm.VLM(dataclasses.replace(model.config, scan_unroll=1))

    wanted = split(abstract, paths)[0]
    factors = {p: x.shape for p, x in flatten(wanted).items() if lora_lib.is_factor(p)}

    def init(rng: Array) -> Params:
        params, _ = split(sharding.unbox(vlm.init_params(model, rng)), paths)
        params = merge(params, unflatten(lora_lib.init(factors, model.config, rng)))
        # A weakly typed parameter would trace the step anew once the optimizer has made it strong.
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), params, wanted)

    return jax.jit(init, out_shardings=shardings_of(wanted))(rng)


def init_opt_state(
    tx: optax.GradientTransformation, trainable: set[str], abstract: TrainState, params: Params
) -> optax.OptState:
    """Returns the initial optimizer state of the parameters at the paths `trainable`, sharded like
    them."""
    trained, _ = split(params, trainable)
    return jax.jit(tx.init, out_shardings=shardings_of(abstract.opt_state))(trained)


def shardings_of(abstract: Any) -> Any:
    """Returns the tree of shardings of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def _with_shardings(make_boxed: Callable[[], Any], mesh: Mesh) -> Any:
    boxed = jax.eval_shape(make_boxed)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        sharding.unbox(boxed),
        sharding.tree_sharding(boxed, mesh),
    )


def _nearest_path(pattern: str, paths: list[str]) -> str:
    """Compares against paths and the folders above them, since patterns mostly name a component."""
    # Of "llm/blocks/attn/q/kernel" these are "llm/.*", "llm/blocks/.*", and so on.
    folders = {
        "/".join(path.split("/")[:n]) + "/.*"
        for path in paths
        for n in range(1, path.count("/") + 1)
    }
    found = nearest(pattern, [*paths, *folders])
    return (
        found
        if found.startswith("; did")
        else nearest(pattern, {path.split("/")[0] + "/.*" for path in paths})
    )
