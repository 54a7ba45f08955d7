"""How much of a row each record would take, from its index."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import Config, VisionConfig
from alignvlm_jax.data import images, index
from alignvlm_jax.data.index import Index
from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """Of R records. Equal to itself alone."""

    # int32 [tasks, R], with image slots, at most a row; 0 where the record is of no use to the task
    tokens: np.ndarray
    tiles: np.ndarray  # int16 [R]


class Limits(NamedTuple):
    """What of a config decides about lengths."""

    row_length: int
    tiles_of_a_record: int
    use_overview: bool
    slots_per_tile: int
    vision: VisionConfig


def load(
    config: Config,
    split: str,
    tasks: Sequence[str],
    sizes: Sequence[int],
    tokenizer: str | os.PathLike,
) -> Lengths:
    """Returns the lengths of a split's records in all of `config.data.folders`, one folder after
    another. They are shared by all of a process, and nobody may write to them.

    Args:
      sizes: how many records each folder has.
      tokenizer: that of training, file or folder.

    Raises:
      UserError: a folder has no index, or not that of its records and this tokenizer, and what to
        call.
    """
    data = config.data
    ours = index.tokenizer_fingerprint(tokenizer)
    indexes = []
    for folder, size in zip(data.folders, sizes, strict=True):
        loaded = index.load(folder, split)
        if loaded.tokenizer != ours:
            raise UserError(
                f"{folder} was counted by another tokenizer or chat format than {tokenizer}; "
                f"{index.recount(folder)}"
            )
        if len(loaded) != size:
            raise UserError(
                f"split {split!r} in {folder} has {size} records and an index of {len(loaded)}; "
                f"{index.recount(folder)}"
            )
        indexes.append(loaded)
    return _measured(tuple(indexes), tuple(tasks), _limits(config))


def measure(index: Index, tasks: Sequence[str], config: Config) -> Lengths:
    """Returns the lengths of an index's records for some of `examples.TASKS`. A record with more
    images than it may have tiles is of no use to any."""
    return _measure(index, tasks, _limits(config))


def _limits(config: Config) -> Limits:
    data = config.data
    return Limits(
        data.row_length,
        data.tiles_of_a_record,
        data.use_overview,
        config.slots_per_tile,
        config.model.vision,
    )


@functools.lru_cache(maxsize=8)
def _measured(indexes: tuple[Index, ...], tasks: tuple[str, ...], limits: Limits) -> Lengths:
    parts = [_measure(index, tasks, limits) for index in indexes]
    tokens = np.concatenate([part.tokens for part in parts], axis=1)
    tiles = np.concatenate([part.tiles for part in parts])
    for array in (tokens, tiles):
        array.setflags(write=False)
    return Lengths(tokens, tiles)


def _measure(index: Index, tasks: Sequence[str], limits: Limits) -> Lengths:
    tiles = _count_tiles(index, limits)
    slots = tiles.astype(np.int32) * limits.slots_per_tile
    tokens = np.stack([index.text_tokens[task] for task in tasks])
    is_usable = (tokens > 0) & (np.diff(index.image_starts) <= limits.tiles_of_a_record)
    return Lengths(np.where(is_usable, np.minimum(tokens + slots, limits.row_length), 0), tiles)


def _count_tiles(index: Index, limits: Limits) -> np.ndarray:
    most = limits.tiles_of_a_record
    num_images = np.diff(index.image_starts)
    tiles = np.zeros(len(num_images), np.int16)
    for count in np.unique(num_images[(num_images > 0) & (num_images <= most)]).tolist():
        records = np.flatnonzero(num_images == count)
        # The images of a record share its tiles evenly.
        for image in range(count):
            sizes = index.image_sizes[index.image_starts[records] + image]
            tiles[records] += images.count_tiles(
                sizes, limits.vision, most // count, limits.use_overview
            ).astype(np.int16)
    return tiles
