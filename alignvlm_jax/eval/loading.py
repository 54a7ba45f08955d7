"""A trained model from its checkpoint, on the devices of this machine, ready to be asked."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, pipeline
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.infer.sampler import Sampler
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, initial
from alignvlm_jax.train.state import Params


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it. `path` is its checkpoint folder, `metadata` that of `checkpoint.describe`."""

    path: Path
    step: int
    metadata: dict[str, Any]
    config: Config
    tokenizer: Tokenizer
    mesh: Mesh
    model: VLM
    params: Params

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params}

    def sampler(self, end_ids: tuple[int, ...] | None = None) -> Sampler:
        """Returns a generator of answers, by default to the tokens that end one; it compiles once for each shape of
        batch."""
        end_ids, pad_id = end_ids or chat.stop_ids(self.tokenizer), self.tokenizer.pad_id
        return Sampler(self.model, self.mesh, end_ids=end_ids, pad_id=pad_id)

    @property
    def batch_ways(self) -> int:
        """Over how many devices the rows of a batch are spread: it must divide the batch."""
        return mesh_lib.batch_ways(self.mesh)


def load_config(path: Path, data_dir: str | None = None) -> Config:
    """Returns the config of the stage that wrote a checkpoint; `data_dir` replaces where it looked for its data. What
    `convert` wrote has its tokenizer with it, wherever it was moved."""
    config = checkpoint.load_config(path)
    beside = workdir_of(path) / initial.TOKENIZER
    if beside.is_dir():
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(beside)))
    return config if data_dir is None else _with_data_dir(config, data_dir)


def load(path: Path, config: Config) -> Loaded:
    """Loads a model.

    Args:
      path: a workdir, whose newest checkpoint is taken, or one checkpoint folder `checkpoints/STEP`.
      config: of `load_config`, for its mesh and `data.dir`. The rest of `Loaded.config` is that of the checkpoint whose
        parameters were read: another one, where those of the newest are damaged.

    Raises:
      UserError: there is no readable checkpoint, or its tokenizer is missing.
    """
    path_of_tokenizer = pipeline.tokenizer_path(config)
    distributed.check_alike({f"tokenizer {path_of_tokenizer}": functools.partial(pipeline.tokenizer_contents, config)})
    tokenizer = pipeline.load_tokenizer(config)
    mesh = mesh_lib.for_inference(config)
    trained, model, params, step = checkpoint.load_model(path, mesh)
    path = workdir_of(path) / checkpoint.FOLDER / str(step)
    metadata = checkpoint.read_newest(path, lambda checkpoints, step: checkpoints.metadata(step))
    return Loaded(path, step, metadata, _with_data_dir(trained, config.data.dir), tokenizer, mesh, model, params)


def workdir_of(path: Path) -> Path:
    """Returns the workdir that a workdir or a checkpoint folder of it names."""
    # Not path.parent.parent: of "7", from inside the folder of checkpoints, that would be ".".
    if (path / checkpoint.FOLDER).is_dir():
        return path
    return path.parent.parent if storage.is_bucket(path) else Path(os.path.normpath(path / ".." / ".."))


def _with_data_dir(config: Config, data_dir: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))
