"""A trained model from its checkpoint, on the devices of this machine."""

import contextlib
import copy
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from alignvlm_jax import storage
from alignvlm_jax.config import Config, DataConfig, ModelConfig, renamed
from alignvlm_jax.data import chat, images, pdf, stage_data, tokenizers
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.tokenizers.base import ChatFiles, Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.sampler import Sampler
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import compile_cache, distributed
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, restore
from alignvlm_jax.train.checkpoint_files import is_step
from alignvlm_jax.train.state import Params
from alignvlm_jax.weights import exported


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what belongs to it.

    Attributes:
      path: its checkpoint folder, `checkpoints/STEP`.
      step: of the run that wrote it.
      metadata: that of `checkpoint.describe`.
      config: of the stage that wrote it.
    """

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
        """Returns a generator of answers, by default to the tokens that end one; it compiles once
        for each shape of batch."""
        end_ids = end_ids or chat.stop_ids(self.tokenizer)
        pad_id = self.tokenizer.pad_id
        return Sampler(self.model, self.mesh, end_ids=end_ids, pad_id=pad_id)

    @property
    def pdf_dpi(self) -> float:
        """Pixels an inch at which it is shown pages of PDFs: as it saw them in training."""
        return exported.pdf_dpi(self.metadata)

    @functools.cached_property
    def builder(self) -> ExampleBuilder:
        """Makes the model's prompts."""
        return ExampleBuilder.of(self.config, self.tokenizer)

    @property
    def data_parallel_size(self) -> int:
        """Over how many devices the rows of a batch are spread: it must divide the batch."""
        return mesh_lib.data_parallel_size(self.mesh)


def load_config(path: Path, data_dir: str | None = None) -> Config:
    """Returns the config of the stage that wrote a checkpoint; `data_dir` replaces where it looked
    for its data. What `convert` wrote has its tokenizer with it, wherever it was moved."""
    config = exported.read(path, lambda checkpoints, step: checkpoints.config(step))
    if beside := tokenizers.of_converted(workdir_of(path)):
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, tokenizer=str(beside))
        )
    if data_dir is None:
        return config
    named = config.data.tokenizer
    if named and not storage.path(named).exists():
        # It has moved: the folder that is named now is where it is looked for.
        data = dataclasses.replace(config.data, tokenizer=data_dir)
        config = dataclasses.replace(config, data=data)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dir=data_dir))


def load_metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata of a checkpoint, of `checkpoint.describe`; `path` is as of `load`."""
    return exported.read(path, lambda checkpoints, step: checkpoints.metadata(step))


def load_page(path: Path, image: Path, page: int) -> Image.Image:
    """Returns a page, of an image or a PDF file, as the model of a checkpoint is shown it; `path`
    is as of `load`, and the other arguments and errors as of `images.load_page`."""
    return images.load_page(image, page, exported.pdf_dpi(load_metadata(path)))


def open_page(
    source: str | Path | Image.Image | np.ndarray, page: int = 1, dpi: float = pdf.DPI
) -> Image.Image:
    """Returns a page as RGB, from a file or from an image in memory.

    Args:
      source: a path, as for `images.load_page`; a Pillow image; or an array, uint8 [Y, X] or
        [Y, X, C] with C of 1, 3 or 4.
      page: number of the page of a PDF file, from 1.
      dpi: pixels an inch at which a PDF page is drawn.

    Raises:
      UserError: the file cannot be read, there is no such page, or an array is no image.
    """
    if isinstance(source, str | os.PathLike):
        return images.load_page(source, page, dpi)
    if page != 1:
        raise UserError(f"an image in memory has no page {page}")
    if isinstance(source, np.ndarray):
        channels = source.shape[2:] or (1,)
        if (
            source.dtype != np.uint8
            or source.ndim not in (2, 3)
            or channels[0] not in (1, 3, 4)
            or not source.size
        ):
            raise UserError(
                f"an array of {source.dtype} {list(source.shape)} is no image: uint8 [Y, X] or "
                "[Y, X, 1, 3 or 4] is"
            )
        source = Image.fromarray(
            source[..., 0] if source.ndim == 3 and channels == (1,) else source
        )
    if not isinstance(source, Image.Image):
        raise UserError(
            f"a {type(source).__name__} is no image: a path, a PIL image or a NumPy array is"
        )
    return images.as_rgb(source)


def load(path: Path, config: Config) -> Loaded:
    """Loads a model.

    Args:
      path: a workdir, whose newest checkpoint is taken, one checkpoint folder
        `checkpoints/STEP`, or a folder that `convert --export` wrote.
      config: of `load_config`, for its mesh and `data.dir`. The rest of `Loaded.config` is that of
        the checkpoint whose parameters were read: another one, where those of the newest are
        damaged.

    Raises:
      UserError: there is no readable checkpoint, or its tokenizer is missing.
    """
    tokenizer = load_tokenizer(path, config.data, config.model)
    mesh = mesh_lib.for_inference(config.mesh, config.model)
    read = functools.partial(restore.read_model, mesh)
    trained, model, params, step = exported.read(path, read)
    path = _checkpoint_of(path, step)
    metadata = load_metadata(path)
    if tokenizer.chat_files.template and renamed.is_from_before(metadata["config"]):
        # Earlier versions read no chat template, and asked by the format of the special tokens.
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_files = ChatFiles(is_from_before=True)
    trained = dataclasses.replace(
        trained, data=dataclasses.replace(trained.data, dir=config.data.dir)
    )
    return Loaded(path, step, metadata, trained, tokenizer, mesh, model, params)


def load_tokenizer(path: Path, data: DataConfig, model: ModelConfig) -> Tokenizer:
    """Returns the tokenizer that a model was trained with: the checkpoint's own, or where it has
    none, that of the config.

    Args:
      path: as of `load`.
      data: of `load_config`.
      model: what it has to fit.

    Raises:
      UserError: it is missing, or does not fit the model.
    """
    step, files = exported.read(path, lambda checkpoints, step: (step, checkpoints.tokenizer(step)))
    if files is None:
        # Each host reads its own copy. Another one on some host would feed other ids to the same
        # program, and no error would tell.
        contents = functools.partial(stage_data.tokenizer_contents, data)
        distributed.check_alike({f"tokenizer {stage_data.tokenizer_path(data)}": contents})
        return stage_data.load_tokenizer(data, model)
    name = _checkpoint_of(path, step) / "tokenizer"
    tokenizer = tokenizers.of_files(files, str(name))
    stage_data.check_fits(tokenizer, name, model)
    return tokenizer


def _checkpoint_of(path: Path, step: int) -> Path:
    """The folder of the checkpoint that was read, which is an older one where the newest is
    damaged; an exported model is its own."""
    if (path / checkpoint.FOLDER).is_dir():
        return path / checkpoint.FOLDER / str(step)
    # From inside a checkpoint's folder, its name is ".".
    return path if is_step(path.name) else storage.absolute(path)


def programs_kept(path: Path) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which compiled programs are kept in the workdir of a checkpoint; of an
    exported model they are not, since it is handed on."""
    return compile_cache.kept_in(None if exported.is_exported(path) else workdir_of(path))


def workdir_of(path: Path) -> Path:
    """Returns the workdir of `restore.workdir_of`; an exported model is its own."""
    return path if exported.is_exported(path) else restore.workdir_of(path)
