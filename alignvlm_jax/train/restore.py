"""Reading of checkpoints by all processes of a run, which agree on the newest readable one."""

import dataclasses
import functools
import json
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignvlm_jax import storage
from alignvlm_jax.config import Config, ModelConfig, TrainConfig, renamed
from alignvlm_jax.data import prepared
from alignvlm_jax.data.tokenizers import ChatFiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.train import heartbeat, lora, state
from alignvlm_jax.train.checkpoint import FOLDER, BrokenCheckpoint, Checkpoints
from alignvlm_jax.train.checkpoint_files import is_step
from alignvlm_jax.train.state import Params

T = TypeVar("T")

BF16 = "bfloat16"
"""As `config.model.dtype` names it."""


def agreed(read: Callable[[], T]) -> T:
    """Returns read(), which all processes call together.

    Raises:
      BrokenCheckpoint: on all processes, if one of them could not read it.
    """
    # Without the exchange, some processes would resume from this checkpoint and others from the one
    # before. Other exceptions pass: they end the run.
    result = None
    problem = None
    try:
        result = read()
    except BrokenCheckpoint as err:
        problem = str(err)
    problems = [told for told in exchange.gather(problem) if told is not None]
    if problems:
        raise BrokenCheckpoint(problems[0])
    return result


def agreed_metadata(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """Returns the metadata of a checkpoint that all processes are about to read.

    Raises:
      BrokenCheckpoint: on all processes, if one of them could not read it.
      UserError: on all processes, if their metadata differ.
    """
    # If the folder is on each host's own disk, one of them may hold another run: the model would be
    # put together from shards of two.
    metadata = agreed(lambda: checkpoints.metadata(step))
    digest = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    run = f"run {str(metadata.get('run_id'))[:8]}, metadata {digest:08x}"
    distributed.check_alike({f"checkpoint {step} of {checkpoints.folder.parent.name}": run})
    return metadata


def read_newest(path: Path, read: Callable[[Checkpoints, int], T]) -> T:
    """Returns read(checkpoints, step) for the newest readable checkpoint at a path.

    Args:
      path: a workdir, or the folder of one checkpoint, `checkpoints/STEP`.
      read: reads a step of the checkpoints; raises BrokenCheckpoint if that is damaged.

    Raises:
      UserError: `path` is neither, or nothing there can be read.
    """
    is_workdir = (path / FOLDER).is_dir()
    # Absolute: from inside a checkpoint's folder its path may be ".", without a name.
    one = storage.absolute(path)
    folder = path / FOLDER if is_workdir else path.parent if is_step(path.name) else one.parent
    storage.check_whole(storage.absolute(folder).parent)
    if not is_workdir and not (path.is_dir() and is_step(one.name)):
        raise UserError(
            f"no checkpoint at {path}: it must be a workdir with {FOLDER}/ in it, or one "
            f"{FOLDER}/STEP; what `convert --export` wrote becomes one by `convert --import`"
        )
    step = None if is_workdir else int(one.name)
    with Checkpoints(folder, read_only=True) as checkpoints:
        problem = ""
        superseded = 0
        waiting = _steps(checkpoints, step)
        while waiting:
            candidate = waiting.pop()
            try:
                agreed_metadata(checkpoints, candidate)
                return agreed(functools.partial(read, checkpoints, candidate))
            except BrokenCheckpoint as err:
                problem = str(err)
            # A run in progress removes superseded checkpoints, even while they are read here: then
            # there are newer ones. If the folder is still there, the checkpoint is damaged.
            if (
                exchange.from_main(not (folder / str(candidate)).exists())
                and superseded < MAX_SUPERSEDED
            ):
                superseded += 1
                waiting = [newer for newer in _steps(checkpoints, step) if newer != candidate]
            elif waiting and distributed.is_main():
                print(f"{problem}; trying the one before", file=sys.stderr)
    raise UserError(problem or heartbeat.no_checkpoint(folder.parent))


def load_config(path: Path) -> Config:
    """Returns the config of the stage that wrote a checkpoint.

    The checkpoint is the newest readable one of the workdir `path`, or `path` itself.
    """
    return read_newest(path, lambda checkpoints, step: checkpoints.config(step))


def load_model(path: Path, mesh: Mesh) -> tuple[Config, vlm.VLM, Params, int]:
    """Returns what `read_model` does of the newest readable checkpoint at `path`, as of
    `read_newest`."""
    return read_newest(path, functools.partial(read_model, mesh))


def read_model(
    mesh: Mesh, checkpoints: Checkpoints, step: int
) -> tuple[Config, vlm.VLM, Params, int]:
    """Reads a model for use, its parameters in the dtypes that they are stored in: what was
    published in bfloat16 takes half of what float32 would. Factors of LoRA are merged into their
    kernels, which then are of the type that the model computes in where that is wider.

    Args:
      mesh: the mesh on which parameters are sharded, which need not be that of training.
      checkpoints: whose checkpoint is read, or what reads like them (`weights.exported`).
      step: of the checkpoint.

    Returns:
      The config of that stage, the model, its parameters, the step.
    """
    stored = checkpoints.stored_params(step)
    config = checkpoints.config(step)
    platform = mesh.devices.flat[0].platform
    dtype = dtype_for_use(config.model, config.train, stored, platform)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    model = vlm.VLM(config.model)
    wanted = state.flatten(state.abstract_params(model, mesh))
    # Not for what is not stored: `restore_params` says that it is missing.
    abstract = {
        path: x.update(dtype=stored[path].dtype) if path in stored else x
        for path, x in wanted.items()
    }
    # Of the checkpoint and not of the config: what was merged before has none.
    factors = lora.abstract_factors(stored, lora.kernels(stored), mesh)
    params = checkpoints.restore_params(step, state.unflatten(abstract | factors))
    return config, model, lora.merge(params, config.lora.alpha, config.model), step


def dtype_for_use(
    model: ModelConfig,
    train: TrainConfig,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    platform: str,
) -> str:
    """Returns the type in which a model of the parameters `stored` computes on devices of a
    platform: where some are in bfloat16 as they were published, bfloat16 on accelerators, which are
    slow in float32; else, and where training held them so, that of training. On CPU float32, in
    which a token is generated three times as fast: XLA converts a cache in bfloat16 at each."""
    if platform == "cpu":
        return "float32"
    is_half = any(x.dtype == jnp.bfloat16 for x in stored.values())
    return BF16 if is_half and not train.bfloat16_params else model.dtype


def workdir_of(path: Path) -> Path:
    """Returns the workdir that a workdir or a checkpoint folder of it names; of a checkpoint that
    was copied from its workdir alone, the folder that it lies in."""
    if (path / FOLDER).is_dir():
        return path
    folder = _above(path)
    # Absolute: the folder of "7" is ".", which has no name.
    name = (folder if storage.is_bucket(folder) else Path(os.path.abspath(folder))).name
    return _above(folder) if name == FOLDER else folder


def _above(path: Path) -> Path:
    # Not path.parent: that of "." is "." again.
    return path.parent if storage.is_bucket(path) else Path(os.path.normpath(path / ".."))


def _steps(checkpoints: Checkpoints, step: int | None) -> list[int]:
    """Returns the steps that may be read, newest last, as the main process sees them."""
    return exchange.from_main(checkpoints.steps()) if step is None else [step]


MAX_SUPERSEDED = 5
"""Number of checkpoints that a run may remove while `read_newest` tries to read them."""


def check_data(folder: Path, stages: Sequence[Config], metadata: Mapping[str, Any]) -> None:
    """Raises UserError where the data of the run in `folder` are not those that the checkpoint with
    this metadata was trained on: its position in them would mean nothing."""
    # Without a checkpoint, or with one from before data had fingerprints.
    if "data" not in metadata:
        return
    folders = next(stage.data.folders for stage in stages if stage.stage == metadata["stage"])
    here = prepared.fingerprint(*folders)
    if not prepared.has_fingerprint(metadata["data"], *folders):
        raise UserError(
            f"{folder} was trained on data of fingerprint {metadata['data']}, "
            f"that of {', '.join(folders)} is {here}; "
            "take the data that it was trained on, or another --workdir"
        )


def check_chat(folder: Path, files: ChatFiles, metadata: Mapping[str, Any]) -> None:
    """Raises UserError where the tokenizer has a chat template and the checkpoint is of an earlier
    version, which read none: the run in `folder` would learn two formats."""
    if files.template and renamed.is_from_before(metadata.get("config", [])):
        raise UserError(
            f"{folder} was trained by the chat format of its special tokens, and {files.name} "
            "has another; take another --workdir, or copy the tokenizer's file into a folder of "
            "its own and set config.data.tokenizer to that"
        )
