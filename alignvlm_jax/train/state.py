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
from flax import struct, traverse_util
from jax.sharding import Mesh

from alignvlm_jax.config import TrainConfig
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Int

Params = dict[str, Any]


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
    """Returns the paths that the stage of the name `stage` trains.

    Raises:
      UserError: a pattern, or all of them, match none.
    """
    chosen = _matched(train, params)
    if not chosen:
        raise UserError(
            f"config.train.trainable is empty in stage {stage!r}: nothing would be trained"
        )
    return chosen


def _matched(train: TrainConfig, params: Params) -> set[str]:
    return match_paths(train.trainable, flatten(params), "train.trainable")


def abstract_state(
    model: vlm.VLM, train: TrainConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, with optimizer state for what is trained
    alone. Nothing is computed."""

    def boxed_state() -> TrainState:
        # Any key would do, since nothing is drawn.
        params = vlm.init_params(model, jax.random.key(0))
        trainable, _ = split(params, _matched(train, params))
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(trainable))

    return _with_shardings(boxed_state, mesh)


def abstract_params(model: vlm.VLM, mesh: Mesh) -> Params:
    """Returns the parameters' shapes, dtypes and shardings, whatever is trained."""
    return _with_shardings(lambda: vlm.init_params(model, jax.random.key(0)), mesh)


def init_params(model: vlm.VLM, abstract: Params, paths: set[str], rng: Array) -> Params:
    """Returns those of the parameters `abstract` that are at `paths`, initialised, float32, each
    shard on its own device.

    The others are never made: XLA drops them.
    """
    # The same numbers, compiled in two thirds of the time.
    model = vlm.VLM(dataclasses.replace(model.config, scan_unroll=1))

    def init(rng: Array) -> Params:
        params, _ = split(sharding.unbox(vlm.init_params(model, rng)), paths)
        # A weakly typed parameter would trace the step anew once the optimizer has made it strong.
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)

    return jax.jit(init, out_shardings=shardings_of(split(abstract, paths)[0]))(rng)


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
