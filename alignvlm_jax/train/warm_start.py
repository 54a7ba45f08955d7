"""The parameters that a stage starts with: loaded from a checkpoint where it has them,
initialised elsewhere."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.table import Table

from alignvlm_jax.config import ModelConfig, TrainConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.shapes import Array
from alignvlm_jax.train import state
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import Params, TrainState


class Found(NamedTuple):
    """What a checkpoint gives: the shapes of all its parameters, and of those asked for the
    arrays."""

    stored: dict[str, tuple[int, ...]]
    params: Params


def read(train: TrainConfig, abstract: TrainState, source: Checkpoints, step: int) -> Found:
    """Returns what matches `train.load` and is in checkpoint `step` of `source`.

    Nothing is computed: where one of several processes cannot read it, all do without, and none has
    begun a program that this one will not join.

    Raises:
      UserError: a pattern of `train.load` matches nothing in the checkpoint, or shapes differ.
      BrokenCheckpoint: the checkpoint cannot be read.
    """
    wanted = _shapes(abstract.params)
    stored = {path: x.shape for path, x in source.stored_params(step).items()}
    loaded = loadable(train, stored, wanted, source.folder / str(step))
    chosen = state.split(abstract.params, loaded)[0]
    return Found(stored, source.restore_params(step, chosen) if loaded else {})


def start_params(
    model: vlm.VLM, abstract: TrainState, found: Found | None, rng: jax.Array
) -> tuple[Params, Table | str]:
    """Returns the parameters, and what was loaded, initialised and ignored: a line where all are of
    one kind, else a table.

    Loaded is what was `found`, where there is a checkpoint; the rest is initialised from `rng`.
    What of the connector starts from the LLM (ALIGN's W2), and is not loaded, is made of the LLM as
    loaded.
    """
    stored, params = found or Found({}, {})
    wanted = _shapes(abstract.params)
    loaded = state.flatten(params).keys()
    initialised = wanted.keys() - loaded
    if initialised:
        params = state.merge(params, state.init_params(model, abstract.params, initialised, rng))
    # Where nothing was loaded, `init_params` has made these of the LLM that it drew.
    if loaded:
        params = from_llm(model.config, params, abstract.params, initialised)
    groups = {
        "loaded": {path: wanted[path] for path in wanted if path in loaded},
        "initialised": {path: wanted[path] for path in wanted if path not in loaded},
        "ignored in the checkpoint": {path: stored[path] for path in stored if path not in loaded},
    }
    return params, summary(groups)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in state.flatten(params).items()}


def loadable(
    train: TrainConfig,
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    name: Path,
) -> set[str]:
    """Returns the paths of `wanted` that a checkpoint of the shapes `stored` gives under
    `train.load`.

    Raises:
      UserError: a pattern matches nothing, or shapes differ; `name` is the checkpoint's.
    """
    chosen = state.match_paths(train.load, stored, "train.load") & wanted.keys()
    for path in sorted(chosen):
        if stored[path] != wanted[path]:
            raise UserError(
                f"{path} is {stored[path]} in checkpoint {name} and {wanted[path]} in "
                "config.model; leave it out of config.train.load, or change the model"
            )
    return chosen


def from_llm(
    model: ModelConfig, params: Params, abstract: Params, paths: Collection[str]
) -> Params:
    """Returns params with those at `paths` that start from the LLM made of the LLM in them, on the
    shardings of `abstract`; the rest is untouched."""
    made = vlm.from_llm_paths(model, params["llm"]).intersection(paths)
    if not made:
        return params
    wanted = state.flatten(abstract)

    def make(llm: Params) -> dict[str, Array]:
        return {path: x for path, x in vlm.from_llm(model, llm).items() if path in made}

    # What it does not read of the LLM is not sent: jit drops unused arguments.
    new = jax.jit(make, out_shardings={path: wanted[path].sharding for path in made})(params["llm"])
    return state.unflatten(state.flatten(params) | new)


def summary(groups: dict[str, dict[str, tuple]]) -> Table | str:
    """Returns the table of groups, or where only one of them has any parameters, a line that says
    so: a stage that loads all that the one before has left is the rule."""
    filled = [name for name, shapes in groups.items() if shapes]
    if len(filled) != 1:
        return table(groups)
    sizes = [int(np.prod(shape)) for shape in groups[filled[0]].values()]
    return f"parameters: all {len(sizes)} arrays, {sum(sizes):,} numbers, are {filled[0]}"


def table(groups: dict[str, dict[str, tuple]]) -> Table:
    """Returns a table of groups of shapes by path, a row for each top-level part; cells are "arrays
    / numbers"."""
    result = Table("part", *groups, title="parameters: arrays / numbers", title_justify="left")
    for part in dict.fromkeys(path.split("/")[0] for group in groups.values() for path in group):
        shapes = (
            [shape for path, shape in group.items() if path.split("/")[0] == part]
            for group in groups.values()
        )
        result.add_row(part, *map(_count, shapes))
    return result


def _count(shapes: list[tuple]) -> str:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return f"{len(sizes)} / {sum(sizes):,}" if sizes else "-"
