"""The parameters that a stage starts with: loaded from a checkpoint where it has them, drawn anew elsewhere."""

from collections.abc import Mapping
from pathlib import Path

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


def start_params(
    model: vlm.VLM, config: Config, abstract: TrainState, source: Checkpoints | None, step: int, rng: jax.Array
) -> tuple[Params, Table]:
    """Returns the parameters, and the table of what was loaded, initialised and ignored.

    Loaded is what matches `config.train.load` and is in checkpoint `step` of `source`, where there is one; the rest is
    drawn from `rng`. ALIGN's W2, where drawn, becomes a copy of the LM head as loaded.

    Raises:
      UserError: a pattern of `train.load` matches nothing in the checkpoint, or shapes differ.
      BrokenCheckpoint: the checkpoint cannot be read.
    """
    wanted = {path: x.shape for path, x in state.flatten(abstract.params).items()}
    stored = {} if source is None else {path: x.shape for path, x in source.stored_params(step).items()}
    loaded = set() if source is None else loadable(config, stored, wanted, source.folder / str(step))
    initialised = wanted.keys() - loaded
    params: Params = {}
    if loaded:
        params = source.restore_params(step, state.split(abstract.params, loaded)[0])
    if initialised:
        params = state.merge(params, state.init_params(model, config, abstract.params, initialised, rng))
    if loaded and W2 in initialised and vlm.has_head_copy(config.model):
        params = with_head_copy(params, abstract.params)
    groups = {
        "loaded": {path: wanted[path] for path in loaded},
        "initialised": {path: wanted[path] for path in wanted if path not in loaded},
        "ignored in the checkpoint": {path: stored[path] for path in stored if path not in loaded},
    }
    return params, table(groups)


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
