"""The parameters that a stage starts with: loaded from a checkpoint where it has them, drawn anew elsewhere."""

from collections.abc import Iterable

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
    stored = {} if source is None else source.param_shapes(step)
    chosen = set() if source is None else state.match_paths(config.train.load, stored, "train.load")
    loaded = chosen & wanted.keys()
    for path in sorted(loaded):
        if stored[path] != wanted[path]:
            raise UserError(
                f"{path} is {stored[path]} in checkpoint {source.folder / str(step)} and "
                f"{wanted[path]} in config.model; leave it out of config.train.load, or change the model"
            )
    initialised = wanted.keys() - loaded
    params: Params = {}
    if loaded:
        params = source.restore_params(step, state.split(abstract.params, loaded)[0])
    if initialised:
        params = state.merge(params, state.init_params(model, config, abstract, initialised, rng))
    if loaded and W2 in initialised and vlm.has_head_copy(config.model):
        params = jax.jit(vlm.copy_head, out_shardings=state.shardings_of(abstract.params))(params)
    return params, _table(stored, wanted, loaded)


def _table(stored: dict[str, tuple], wanted: dict[str, tuple], loaded: set[str]) -> Table:
    """One row a top-level part; cells are "arrays / parameters"."""
    groups = {
        "loaded": {path: wanted[path] for path in loaded},
        "initialised": {path: wanted[path] for path in wanted if path not in loaded},
        "ignored in the checkpoint": {path: stored[path] for path in stored if path not in loaded},
    }
    table = Table("part", *groups, title="parameters: arrays / numbers", title_justify="left")
    for part in dict.fromkeys(path.split("/")[0] for path in [*wanted, *stored]):
        table.add_row(part, *(_count(shape for path, shape in group.items() if path.split("/")[0] == part)
                              for group in groups.values()))  # fmt: skip
    return table


def _count(shapes: Iterable[tuple]) -> str:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return f"{len(sizes)} / {sum(sizes):,}" if sizes else "-"
