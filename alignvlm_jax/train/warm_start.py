"""The parameters that a stage starts with: loaded from a checkpoint where it has them, drawn anew elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.table import Table

from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.train import state
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import Params, TrainState

W2 = "connector/w2/kernel"


class Found(NamedTuple):
    """What a checkpoint gives: the shapes of all its parameters, and of those asked for the arrays."""

    stored: dict[str, tuple[int, ...]]
    params: Params


def read(config: Config, abstract: TrainState, source: Checkpoints, step: int) -> Found:
    """Returns what matches `config.train.load` and is in checkpoint `step` of `source`.

    Nothing is computed: where one of several processes cannot read it, all do without, and none has begun a program
    that this one will not join.

    Raises:
      UserError: a pattern of `train.load` matches nothing in the checkpoint, or shapes differ.
      BrokenCheckpoint: the checkpoint cannot be read.
    """
    wanted = _shapes(abstract.params)
    stored = {path: x.shape for path, x in source.stored_params(step).items()}
    loaded = loadable(config, stored, wanted, source.folder / str(step))
    chosen = state.split(abstract.params, loaded)[0]
    return Found(stored, source.restore_params(step, chosen) if loaded else {})


def start_params(
    model: vlm.VLM, config: Config, abstract: TrainState, found: Found | None, rng: jax.Array
) -> tuple[Params, Table]:
    """Returns the parameters, and the table of what was loaded, initialised and ignored.

    Loaded is what was `found`, where there is a checkpoint; the rest is drawn from `rng`. ALIGN's W2, where drawn,
    becomes a copy of the LM head as loaded.
    """
    stored, params = found or Found({}, {})
    wanted, loaded = _shapes(abstract.params), state.flatten(params).keys()
    initialised = wanted.keys() - loaded
    if initialised:
        params = state.merge(params, state.init_params(model, config, abstract.params, initialised, rng))
    if loaded and W2 in initialised and vlm.has_head_copy(config.model):
        params = with_head_copy(params, abstract.params)
    groups = {
        "loaded": {path: wanted[path] for path in wanted if path in loaded},
        "initialised": {path: wanted[path] for path in wanted if path not in loaded},
        "ignored in the checkpoint": {path: stored[path] for path in stored if path not in loaded},
    }
    return params, table(groups)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in state.flatten(params).items()}


def loadable(
    config: Config, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], name: Path
) -> set[str]:
    """Returns the paths of `wanted` that a checkpoint of the shapes `stored` gives under `config.train.load`.

    Raises:
      UserError: a pattern matches nothing, or shapes differ; `name` is the checkpoint's.
    """
    chosen = state.match_paths(config.train.load, stored, "train.load") & wanted.keys()
    for path in sorted(chosen):
        if stored[path] != wanted[path]:
            raise UserError(
                f"{path} is {stored[path]} in checkpoint {name} and {wanted[path]} in config.model; leave it out of "
                "config.train.load, or change the model"
            )
    return chosen


def with_head_copy(params: Params, abstract: Params) -> Params:
    """Returns params with ALIGN's W2 a copy of the LM head, on the sharding of `abstract`; the rest is untouched."""
    part = "head" if "head" in params["llm"] else "embed"
    copy = jax.jit(vlm.lm_head, out_shardings=state.flatten(abstract)[W2].sharding)
    w2 = copy({part: params["llm"][part]})
    return state.unflatten(state.flatten(params) | {W2: w2})


def table(groups: dict[str, dict[str, tuple]]) -> Table:
    """Returns a table of groups of shapes by path, a row for each top-level part; cells are "arrays / numbers"."""
    result = Table("part", *groups, title="parameters: arrays / numbers", title_justify="left")
    for part in dict.fromkeys(path.split("/")[0] for group in groups.values() for path in group):
        shapes = ([shape for path, shape in group.items() if path.split("/")[0] == part] for group in groups.values())
        result.add_row(part, *map(_count, shapes))
    return result


def _count(shapes: list[tuple]) -> str:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return f"{len(sizes)} / {sum(sizes):,}" if sizes else "-"
