"""A checkpoint out of orbax into published formats, read one parameter at a time."""

from pathlib import Path

import jax
import numpy as np

from alignvlm_jax import storage
from alignvlm_jax.data import pipeline
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, state
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.weights import export


def write(path: Path, out: Path, parts: tuple[str, ...]) -> dict[str, int]:
    """Writes `parts` of a checkpoint into the folder `out`, which appears whole or not at all.

    Args:
      path: a workdir, whose newest readable checkpoint is taken, or one checkpoint folder `checkpoints/STEP`.

    Returns:
      The number of tensors written, by part.

    Raises:
      UserError: `out` exists, there is no readable checkpoint, its tokenizer is missing, or a part cannot be expressed.
    """
    storage.refuse_existing(out)
    return checkpoint.read_newest(path, lambda checkpoints, step: _write(checkpoints, step, out, parts))


def _write(checkpoints: Checkpoints, step: int, out: Path, parts: tuple[str, ...]) -> dict[str, int]:
    config, stored = checkpoints.config(step), checkpoints.stored_params(step)
    export.check(config.model, parts)
    mesh = mesh_lib.single_device()
    abstract = state.flatten(state.abstract_params(vlm.VLM(config.model), config, mesh))

    def read(path: str) -> np.ndarray:
        # In the dtype that is stored: what is not rounded on its way in must not be on its way out.
        wanted = jax.ShapeDtypeStruct(stored[path].shape, stored[path].dtype, sharding=abstract[path].sharding)
        return np.asarray(state.flatten(checkpoints.restore_params(step, state.unflatten({path: wanted})))[path])

    with storage.whole_folder(out) as target, storage.local_folder(target) as staging:
        counts = export.write(config.model, stored, read, staging, parts)
        if "llm" in parts:
            export.copy_tokenizer(pipeline.tokenizer_path(config), staging / "llm")
    return counts
