"""What is checked before anything is compiled: every stage of a run, with its data."""

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import jax
import numpy as np
from absl import logging

from alignvlm_jax import logs, storage
from alignvlm_jax.config import Config
from alignvlm_jax.data import loader, prepared, stage_data, tiling, validation
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import distributed
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import goodput, restore, state, warm_start
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import Params

CPU_FLOPS = 3e10
"""FLOPs a second of a core, of an ordinary one in float32."""
LONG_STEP_SECONDS = 60.0
"""Seconds of a step from which a CPU is the wrong place for a stage."""
LEGIBLE_PIXELS = 5.0
"""Height of a word's box, in pixels of a tile, below which hardly anybody can read it."""
NUM_MEASURED = 8
"""Pages of which that is looked at."""


def open_stages(stages: tuple[Config, ...]) -> list[StageData]:
    """Returns the data of each stage, opened. A tokenizer that stages share is read once. A stage
    that is far too large for this machine's CPU is told on stderr, and so is how it is packed.

    Raises:
      UserError: a stage asks for what is not there: a connector, a mesh for its batch, sizes that
        divide over it, data and tasks, parameters to train, to load from the stage before or from
        `init_from`.
    """
    shapes: dict[tuple, Params] = {}
    before: Params | None = None
    tokenizers: dict[Path, Tokenizer] = {}
    found = []
    slowest = (0.0, "")
    for config in stages:
        mesh = mesh_lib.make_mesh(config.mesh, config.model, config.train)
        if not config.train.jit and mesh.size > 1:
            raise UserError(
                f"config.train.jit is False and there are {mesh.size} devices: a step that is not "
                "compiled runs on one; show it one, as by JAX_PLATFORMS=cpu or "
                "CUDA_VISIBLE_DEVICES=0"
            )
        opened = StageData.open(config.data, config.model, tokenizers)
        # Both are made for what they raise.
        sequences = loader.TrainSequences(config, config.data.split, opened)
        validation.by_source(config, opened)
        sequences.check_words()
        for folder in config.data.folders:
            # Checkpoints hold it: a damaged one would be told at the first save.
            prepared.description(folder)
        # Read now, for checkpoints to hold: what is missing would be told at the first save.
        _ = opened.tokenizer_files
        found.append(opened)
        # Stages mostly share a model, and tracing it takes most of a second.
        key = config.model, config.mesh, config.train.bfloat16_params, config.lora
        if key not in shapes:
            model = vlm.VLM(config.model)
            shapes[key] = state.abstract_params(model, mesh, config.train, config.lora)
        trained = state.trainable_paths(config.train, config.stage, shapes[key])
        if jax.default_backend() == "cpu":
            sizes = {path: math.prod(x.shape) for path, x in state.flatten(shapes[key]).items()}
            # The full length, since what is not filled is padding, and computed all the same.
            num_patches = config.data.max_tiles * config.model.vision.num_patches
            positions = {"vision": num_patches, "connector": num_patches}
            positions["llm"] = config.data.seq_len if config.train.answer_weight else 0
            seconds = _cpu_seconds(sizes, trained, positions) * config.train.batch_size
            slowest = max(slowest, (seconds, config.stage))
        if before is None and config.init_from:
            _check_init_from(config, shapes[key])
        if before is not None:
            warm_start.loaded_paths(config.train, state.flatten(before))
        before = shapes[key]
        sees_pixels = config.train.visual_source == "pixels"
        if distributed.is_main() and sees_pixels and (small := _about_legibility(sequences)):
            logs.say(f"stage {config.stage!r}: {small}")
        # The last thing of a stage: what is wrong with it should not wait for a plan.
        if distributed.is_main() and (about := sequences.about_packing()):
            logs.say(about)
            logging.info("%s", about)
    seconds, stage = slowest
    if seconds > LONG_STEP_SECONDS and distributed.is_main():
        logs.say(
            f"a step of stage {stage!r} takes minutes on this machine's CPU, about "
            f"{goodput.duration(seconds)}: --config=trial is made for it"
        )
    return found


def _about_legibility(sequences: loader.TrainSequences) -> str:
    """Returns that the words of the first pages are too small in their tiles to be read, and how
    small they are; empty where they are not, or no words are known."""
    builder = sequences.builder
    heights = []
    for record in itertools.islice(sequences.first_records(), NUM_MEASURED):
        with contextlib.suppress(UserError):
            heights += tiling.word_heights(builder.tile_pages(record), record.lines)
    median = float(np.median(heights)) if heights else LEGIBLE_PIXELS
    if median >= LEGIBLE_PIXELS:
        return ""
    data = builder.data
    return (
        f"words in {', '.join(data.folders)} are {median:.1f} pixels high in its tiles, and below "
        f"{LEGIBLE_PIXELS:g} few can be read: config.data.record_tiles is "
        f"{data.tiles_of_a_record}, of {builder.vision.tile_width} x {builder.vision.tile_height} "
        "pixels"
    )


def _cpu_seconds(
    sizes: Mapping[str, int], trained: Set[str], positions: Mapping[str, int]
) -> float:
    """Returns about how long a training step takes for each of its sequences on this machine's
    cores.

    Args:
      sizes: number of each parameter's elements, by path.
      trained: the paths of those that are trained.
      positions: by component, how many vectors of a sequence go through it.
    """
    flops = 0.0
    for path, size in sizes.items():
        component = path.split("/")[0]
        # Two of a multiplication and an addition; as many again for each of two gradients, of which
        # what lies before all that is trained has none.
        has_gradients = component != "vision" or path in trained
        # Factors go through nothing but their sum with a kernel.
        flops += (6 if has_gradients else 2) * size * positions.get(component, 0)
    return flops / (CPU_FLOPS * (os.cpu_count() or 1))


def files_of(configs: tuple[Config, ...]) -> dict[str, Callable[[], str]]:
    """Returns functions that say, by what they are of, what the files of each stage hold: for
    processes to compare. Data that stages share are read once."""
    contents = functools.cache(prepared.contents)
    data = {
        f"the data of stage {one.stage}": functools.partial(contents, *one.data.folders)
        for one in configs
    }
    tokenizers = {
        f"the tokenizer of stage {one.stage}": functools.partial(
            stage_data.tokenizer_contents, one.data
        )
        for one in configs
    }
    return data | tokenizers


def _check_init_from(config: Config, abstract: Params) -> None:
    """Raises UserError where `init_from` has not what the stage loads, or in other shapes."""
    wanted = {path: x.shape for path, x in state.flatten(abstract).items()}

    def check(checkpoints: Checkpoints, step: int) -> None:
        stored = {path: x.shape for path, x in checkpoints.stored_params(step).items()}
        warm_start.loadable(config.train, stored, wanted, checkpoints.folder / str(step))

    restore.read_newest(storage.path(config.init_from), check)
