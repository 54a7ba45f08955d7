"""How much of a row each record would take, from its index."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import Config
from alignvlm_jax.data import images, index
from alignvlm_jax.data.index import Index
from alignvlm_jax.errors import UserError


class Lengths(NamedTuple):
    """Of R records."""

    tokens: np.ndarray  # int32 [tasks, R], with image slots, at most a row; 0 where the record is of no use to the task
    tiles: np.ndarray  # int16 [R]


def load(config: Config, split: str, tasks: Sequence[str], sizes: Sequence[int], tokenizer: Path) -> Lengths:
    """Returns the lengths of a split's records in all of `config.data.folders`, one folder after another.

    Args:
      sizes: how many records each folder has.
      tokenizer: that of training, file or folder.

    Raises:
      UserError: a folder has no index, or not that of its records and this tokenizer, and what to call.
    """
    data, ours = config.data, index.tokenizer_fingerprint(tokenizer)
    parts = []
    for folder, size in zip(data.folders, sizes, strict=True):
        loaded = index.load(folder, split)
        if loaded.tokenizer != ours:
            raise UserError(f"{folder} was counted by another tokenizer than {tokenizer}; {index.recount(folder)}")
        if len(loaded) != size:
            raise UserError(
                f"split {split!r} in {folder} has {size} records and an index of {len(loaded)}; {index.recount(folder)}"
            )
        parts.append(measure(loaded, tasks, config))
    return Lengths(
        np.concatenate([part.tokens for part in parts], axis=1), np.concatenate([part.tiles for part in parts])
    )


def measure(index: Index, tasks: Sequence[str], config: Config) -> Lengths:
    """Returns the lengths of an index's records for some of `rows.TASKS`. A record with more images than it may have
    tiles is of no use to any."""
    tiles = _count_tiles(index, config)
    slots = tiles.astype(np.int32) * config.slots_per_tile
    tokens = np.stack([index.text_tokens[task] for task in tasks])
    is_usable = (tokens > 0) & (np.diff(index.image_starts) <= config.data.tiles_of_a_record)
    return Lengths(np.where(is_usable, np.minimum(tokens + slots, config.data.row_length), 0), tiles)


def _count_tiles(index: Index, config: Config) -> np.ndarray:
    most = config.data.tiles_of_a_record
    num_images = np.diff(index.image_starts)
    tiles = np.zeros(len(num_images), np.int16)
    for count in np.unique(num_images[(num_images > 0) & (num_images <= most)]).tolist():
        records = np.flatnonzero(num_images == count)
        # The images of a record share its tiles evenly.
        for image in range(count):
            sizes = index.image_sizes[index.image_starts[records] + image]
            tiles[records] += images.count_tiles(
                sizes, config.model.vision, most // count, config.data.use_overview
            ).astype(np.int16)
    return tiles
