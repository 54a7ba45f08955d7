"""How much of a packed sequence each record would take, from its index."""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import DataConfig, VisionConfig
from alignvlm_jax.data import images, index, packing, plan_file
from alignvlm_jax.data.index import Index
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """The lengths of R records; equal to itself alone."""

    # int32 [tasks, R], with image tokens, at most `seq_len`; 0 where the record is of no use to the
    # task
    tokens: np.ndarray
    tiles: np.ndarray  # int16 [R]


class Limits(NamedTuple):
    """What of a config decides about lengths."""

    seq_len: int
    tiles_of_a_record: int
    use_overview: bool
    tokens_per_tile: int
    vision: VisionConfig

    @classmethod
    def of(cls, data: DataConfig, vision: VisionConfig, tokens_per_tile: int) -> "Limits":
        """Returns the limits of a stage's sequences, with so many image tokens for each tile.

        Raises:
          UserError: its tiles do not follow from the sizes of pages.
        """
        if data.tiling != "grid":
            raise UserError(
                f"config.data.tiling {data.tiling!r}: the tiles of a record follow from its "
                "pixels, and no index of sizes can count them; 'grid' can be counted"
            )
        return cls(data.seq_len, data.tiles_of_a_record, data.use_overview, tokens_per_tile, vision)


def load(
    opened: StageData,
    folders: Sequence[str],
    split: str,
    tasks: Sequence[str],
    sizes: Sequence[int],
    limits: Limits,
) -> Lengths:
    """Returns the lengths of a split's records in all folders, one folder after another. They are
    shared by all of a process, and nobody may write to them.

    Args:
      opened: has the indexes, and the tokenizer that they have to be counted by.
      folders: where the records are.
      split: theirs.
      tasks: some of `tasks.TASKS`.
      sizes: how many records each folder has.
      limits: of a sequence.

    Raises:
      UserError: a folder has no index, or not that of its records and this tokenizer, and what to
        call.
    """
    ours = index.fingerprint_of(opened.tokenizer)
    indexes = []
    for folder, size in zip(folders, sizes, strict=True):
        loaded = opened.index(folder, split)
        if loaded.tokenizer != ours:
            raise UserError(
                f"{folder} was counted by another tokenizer or chat format than "
                f"{opened.tokenizer_path}; {index.recount(folder, opened.tokenizer_path)}"
            )
        if len(loaded) != size:
            raise UserError(
                f"split {split!r} in {folder} has {size} records and an index of {len(loaded)}; "
                f"{index.recount(folder)}"
            )
        indexes.append(loaded)
    return _measured(tuple(indexes), tuple(tasks), limits)


@functools.lru_cache(maxsize=8)
def _measured(indexes: tuple[Index, ...], tasks: tuple[str, ...], limits: Limits) -> Lengths:
    def make() -> dict[str, np.ndarray]:
        whole = _measure_all(indexes, tasks, limits)
        return {"tokens": whole.tokens, "tiles": whole.tiles}

    if sum(map(len, indexes)) < plan_file.MIN_RECORDS:
        return _measure_all(indexes, tasks, limits)
    digest = hashlib.blake2b(repr((tasks, limits)).encode(), digest_size=8)
    for one in indexes:
        for array in (*one.text_tokens.values(), one.image_sizes, one.image_starts):
            digest.update(np.ascontiguousarray(array))
    # With the way of measuring: a version that measures otherwise must not map what this one made.
    probed = measure(_probe(tasks), tasks, limits)
    for array in (probed.tokens, probed.tiles):
        digest.update(np.ascontiguousarray(array))
    return Lengths(**plan_file.shared(f"lengths-{digest.hexdigest()}", make))


def _probe(tasks: Sequence[str]) -> Index:
    """Returns an index of a few hundred records, always the same, of many sizes and lengths."""
    numbers = np.arange(400)
    num_images = numbers % 5
    starts = np.append(0, np.cumsum(num_images))
    images_of_all = np.arange(starts[-1])
    sizes = np.stack([images_of_all * 37 % 3001, images_of_all * 101 % 2003], axis=1) + 1
    # Some lack what a task needs.
    texts = {task: (numbers * 29 % 1009).astype(np.int32) for task in tasks}
    texts = {task: text * (numbers % 7 > 0) for task, text in texts.items()}
    hashes = np.zeros(len(numbers), np.uint64)
    return Index(texts, sizes.astype(np.int32), starts, hashes, "")


def _measure_all(indexes: Sequence[Index], tasks: Sequence[str], limits: Limits) -> Lengths:
    """Returns the lengths of the records of several indexes, one after another."""
    found = [measure(index, tasks, limits) for index in indexes]
    if len(found) == 1:
        return found[0]
    tokens = np.concatenate([one.tokens for one in found], axis=1)
    tiles = np.concatenate([one.tiles for one in found])
    for array in (tokens, tiles):
        array.setflags(write=False)
    return Lengths(tokens, tiles)


def measure(index: Index, tasks: Sequence[str], limits: Limits) -> Lengths:
    """Returns the lengths of an index's R records for some of `tasks.TASKS`. A record with more
    images than it may have tiles is of no use to any."""
    tokens = np.zeros((len(tasks), len(index)), np.int32)
    tiles = np.zeros(len(index), np.int16)

    def fill(block: slice) -> None:
        starts = index.image_starts[block.start : block.stop + 1]
        num_images = np.diff(starts)
        tiles[block] = _count_tiles(index.image_sizes, starts[:-1], num_images, limits)
        image_tokens = tiles[block].astype(np.int32) * limits.tokens_per_tile
        for task, found in zip(tasks, tokens, strict=True):
            text = index.text_tokens[task][block]
            # Where a record lacks what a task needs, its text has 0 tokens: its image tokens must
            # not make it look like one of use.
            is_usable = (text > 0) & (num_images <= limits.tiles_of_a_record)
            found[block] = np.where(is_usable, np.minimum(text + image_tokens, limits.seq_len), 0)

    # On threads, since numpy lets go of the interpreter while it computes.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        collections.deque(pool.map(fill, packing.blocks(len(index))), maxlen=0)
    for array in (tokens, tiles):
        array.setflags(write=False)
    return Lengths(tokens, tiles)


def _count_tiles(
    sizes: np.ndarray, starts: np.ndarray, num_images: np.ndarray, limits: Limits
) -> np.ndarray:
    """Returns the tiles of R records, int16 [R].

    Args:
      sizes: height and width of all images of all records, [M, 2].
      starts: the first image of each record, [R].
      num_images: how many it has, [R].
      limits: of a sequence.
    """
    most = limits.tiles_of_a_record
    tiles = np.zeros(len(num_images), np.int16)
    for count in np.unique(num_images[(num_images > 0) & (num_images <= most)]).tolist():
        records = np.flatnonzero(num_images == count)
        # The images of a record share its tiles evenly.
        for image in range(count):
            # [records, 2]: of each of these records its image of this number. Most pages of a set
            # are of few sizes, each of which is looked at once.
            its_sizes = sizes[starts[records] + image].astype(np.int64)
            keys = its_sizes[:, 0] << 32 | its_sizes[:, 1]
            different, where = np.unique(keys, return_inverse=True)
            counted = images.count_tiles(
                np.stack([different >> 32, different & 0xFFFFFFFF], axis=1),
                limits.vision,
                most // count,
                limits.use_overview,
            )
            tiles[records] += counted[where].astype(np.int16)
    return tiles


class Tiling(NamedTuple):
    """What becomes of the pages of a split that are cut into tiles of a shape."""

    vision: VisionConfig
    max_tiles: int
    tokens: float  # patches of a page, on average
    padding: float  # fraction of them that show none of it
    detail: float  # pixels along a side that are left of one of the page, on average; at most 1


def tiling(sizes: np.ndarray, vision: VisionConfig, max_tiles: int, use_overview: bool) -> Tiling:
    """Returns what becomes of pages of these heights and widths, int [M, 2], to within a row or
    column of patches: the cells of a page are taken as equal.

    Other arguments are those of `images.choose_grids`.
    """
    grids = images.choose_grids(sizes, vision, max_tiles, use_overview)
    cells = np.minimum(grids, sizes).prod(1)
    scales, shown = _patches_shown(sizes / grids, vision)
    shown = shown * cells
    if use_overview:
        has_overview = grids.prod(1) > 1
        shown += _patches_shown(sizes, vision)[1] * has_overview
        cells = cells + has_overview
    tokens = cells * vision.num_patches
    return Tiling(
        vision,
        max_tiles,
        float(tokens.mean()),
        1 - float(shown.sum() / tokens.sum()),
        float(np.minimum(scales, 1).mean()),
    )


def _patches_shown(cells: np.ndarray, vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scales of cells [M, 2] in their tiles [M], and how many patches show some of
    each [M]."""
    tile = np.array([vision.tile_height, vision.tile_width])
    patch = np.array([vision.patch_height, vision.patch_width])
    scales = (tile / cells).min(1)
    # Sides are rounded to pixels before patches see them.
    sides = np.maximum(np.round(cells * scales[:, None]), 1)
    shown = np.minimum(np.ceil(sides / patch), vision.patch_grid)
    return scales, shown.prod(1)
