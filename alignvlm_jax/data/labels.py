"""Patch labels: the tokens that each patch shows, weighted by their area within the patch."""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import DataConfig, VisionConfig
from alignvlm_jax.data import tiling
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.record import Word
from alignvlm_jax.data.tokenizers import letters
from alignvlm_jax.data.tokenizers.base import Tokenizer

MIN_COVERED = 1 / 8
"""Fraction of a patch that text must cover, below which the patch counts as blank."""
VERTICAL = 2
"""How many times as high as wide the box of a word is that runs up or down the page. Of letters
side by side, three of the narrowest ("ill") are not."""


class PatchLabels(NamedTuple):
    """The labels of the patches of n tiles, P a tile, k a patch."""

    ids: np.ndarray  # int32 [n, P, k], tokens, the largest areas first
    # float32 [n, P, k], sum to 1 on every patch; unused labels are spaces of weight 0
    weights: np.ndarray
    loss_weights: np.ndarray  # float32 [n, P], of the patches in the loss, from 0 to 1


class PlacedTokens(NamedTuple):
    """The M tokens of a page."""

    ids: np.ndarray  # int32 [M]
    boxes: np.ndarray  # float32 [M, 4], on the page
    # float32 [M], of their letters, in pixels of the page; -1 where it is not known which part of
    # its word's box is a token's
    heights: np.ndarray


def patch_labels(
    lines: Iterable[Iterable[Word]],
    tiles: Tiles,
    tokenizer: Tokenizer,
    vision: VisionConfig,
    data: DataConfig,
) -> PatchLabels:
    """Returns the labels of the patches of one page.

    A patch has the k tokens with the largest area in it. The part of a text line's height that no
    token covers counts as a space, and a patch without text is a space alone.

    In the loss a patch with text weighs by the fraction that text covers, and a blank one
    `data.blank_weight`. What cannot be seen is not taught, neither as text nor as blank: patches
    whose text is too low to be read, as on the overview of a page, and those that a word's box
    covers but none of its ink.

    Args:
      lines: the words of the page, by lines.
      tiles: the tiles of the page.
      tokenizer: encodes the words.
      vision: gives the grid of patches.
      data: k is its `max_patch_labels`; it says from when on text is seen.
    """
    placed = place_tokens(lines, tokenizer, data.label_unit)
    # Sorted once for all tiles: `_tile_labels` sums the areas of equal ids as runs.
    order = np.argsort(placed.ids, kind="stable")
    placed = PlacedTokens(*(array[order] for array in placed))
    labels = [
        _tile_labels(placed, crop, scale, tokenizer.space_id, vision, data)
        for crop, scale in zip(tiles.crops, tiles.scales, strict=True)
    ]
    ids, areas, covered, unread = (np.stack(part) for part in zip(*labels, strict=True))
    # No patch has an area of 0: a blank one has 1, of its space.
    weights = areas / areas.sum(-1, keepdims=True)
    has_text = covered >= MIN_COVERED
    loss_weights = np.where(
        has_text,
        # A flat patch is a gap, or lies within a stroke of a large letter: none tells which.
        np.minimum(covered / data.full_cover, 1)
        * (tiling.contrast(tiles.pixels, vision) >= data.min_contrast),
        np.where(unread >= MIN_COVERED, 0, data.blank_weight),
    )
    return PatchLabels(ids, weights, loss_weights.astype(np.float32))


def labels_of_record(
    pages: Sequence[Sequence[Sequence[Word]]],
    tiles: Sequence[Tiles],
    tokenizer: Tokenizer,
    vision: VisionConfig,
    data: DataConfig,
) -> PatchLabels:
    """Returns the labels of all tiles of a record, page after page; n is 0 without a page.

    Args:
      pages: the lines of each page; none where they are not known or not needed, and no patch then
        carries loss.
      tiles: of each page.
      tokenizer: see `patch_labels`, as for the arguments below.
      vision: as above.
      data: as above.
    """
    if pages and tiles:
        found = [
            patch_labels(lines, of_page, tokenizer, vision, data)
            for lines, of_page in zip(pages, tiles, strict=True)
        ]
        return PatchLabels(*map(np.concatenate, zip(*found, strict=True)))
    num_tiles = sum(len(of_page.pixels) for of_page in tiles)
    weights = np.zeros((num_tiles, vision.num_patches, data.max_patch_labels), np.float32)
    # They sum to 1 here, too: what an average of embeddings is divided by.
    weights[..., 0] = 1
    ids = np.full(weights.shape, tokenizer.space_id, np.int32)
    return PatchLabels(ids, weights, np.zeros(weights.shape[:2], np.float32))


def patch_boxes(tiles: Tiles, vision: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the patches of n tiles lie on the page, float64 [n, P, 4], and which of them
    show any of it, bool [n, P]: others lie in the padding of their tile."""
    rows, columns = vision.patch_grid
    size = np.array([vision.patch_width, vision.patch_height])
    # [P, 2]: where each patch begins in its tile, x before y, row after row as the encoder has
    # them.
    corners = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) * size
    # [n, 1, 4] and [n, 1, 2] meet [P, 2]: corners [n, P, 2] on the page.
    crops = tiles.crops[:, None]
    scales = tiles.scales[:, None]
    left_top = crops[..., :2] + corners / scales
    # The crop cuts off patches that lie on the white rest of a tile; of those nothing is left.
    right_bottom = np.minimum(crops[..., :2] + (corners + size) / scales, crops[..., 2:])
    return np.concatenate([left_top, right_bottom], -1), (right_bottom > left_top).all(-1)


def place_tokens(
    lines: Iterable[Iterable[Word]], tokenizer: Tokenizer, unit: str = "token"
) -> PlacedTokens:
    """Returns the tokens of all words, or of their characters, see `DataConfig.label_unit`, with
    their places on the page.

    A token reaches from the edge where its first character begins to that where its last ends, and
    is as high as its word.
    """
    found = []
    for line in lines:
        for word in line:
            left, top, right, bottom = word.box
            edges, is_column = _edges(word)
            for token, start, end in _token_offsets(word.text, tokenizer, unit):
                low, high = sorted((edges[start], edges[end]))
                if not is_column:
                    found.append((token, low, top, high, bottom, bottom - top))
                elif is_stacked(word.text):
                    found.append((token, left, low, right, high, right - left))
                else:
                    # Turned letters run up or down, and the box does not tell which.
                    found.append((token, *word.box, -1))
    table = np.array(found, np.float64).reshape(-1, 6)
    return PlacedTokens(
        table[:, 0].astype(np.int32),
        table[:, 1:5].astype(np.float32),
        table[:, 5].astype(np.float32),
    )


def _token_offsets(text: str, tokenizer: Tokenizer, unit: str) -> list[tuple[int, int, int]]:
    """Returns (id, start, end) for every token of a word, or of its characters one by one."""
    if unit == "token":
        return tokenizer.token_offsets(text)
    found = []
    for start, character in enumerate(text):
        tokens = letters.of_character(character, tokenizer)
        if unit == "letter" and start == 0:
            # The space says where a word begins.
            tokens = letters.with_space(character, tokenizer) or tokens
        found += [(token, start, start + 1) for token in tokens]
    return found


def _edges(word: Word) -> tuple[Sequence[float], bool]:
    """Returns where the characters of a word begin and the last one ends, len(text) + 1 numbers,
    and whether they are y coordinates: those of a word up or down the page."""
    left, top, right, bottom = word.box
    if word.edges is not None:
        return word.edges, False
    # Without known edges characters are taken as equally wide.
    count = len(word.text) + 1
    if count > 3 and bottom - top > VERTICAL * (right - left):
        return np.linspace(top, bottom, count), True
    # Hebrew and Arabic begin at the right.
    ends = (right, left) if is_from_the_right(word.text) else (left, right)
    return np.linspace(*ends, count), False


def is_from_the_right(text: str) -> bool:
    """Whether a word is of a script that is written from right to left, by its first letter."""
    return unicodedata.bidirectional(text[0]) in ("R", "AL") if text else False


def is_stacked(text: str) -> bool:
    """Whether a word in a column is read from its top, each character upright: Chinese, Japanese
    and Korean are, by the first character."""
    return unicodedata.east_asian_width(text[0]) in ("W", "F") if text else False


def _tile_labels(
    placed: PlacedTokens,
    crop: np.ndarray,
    scale: np.ndarray,
    space_id: int,
    vision: VisionConfig,
    data: DataConfig,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the labels of one tile: ids [P, k], areas [P, k], and the fractions of the patches
    that text covers which can be read [P], and which cannot [P].

    Args:
      placed: tokens of the page sorted by id.
      crop: the tile's box on the page, float32 [4].
      scale: pixels of the tile a pixel of the page along x and y, float32 [2].
      space_id: the token of a space.
      vision: gives the grid of patches.
      data: k is its `max_patch_labels`.
    """
    rows, columns = vision.patch_grid
    patch_area = vision.patch_height * vision.patch_width
    boxes = placed.boxes
    # [M, 2] each, in pixels of the tile: where a token starts and stops. Clipped to the crop, a
    # token outside of it has no extent.
    x = (boxes[:, 0::2].clip(crop[0], crop[2]) - crop[0]) * scale[0]
    y = (boxes[:, 1::2].clip(crop[1], crop[3]) - crop[1]) * scale[1]
    shown = (x[:, 0] < x[:, 1]) & (y[:, 0] < y[:, 1])
    width = _overlap(x[shown], vision.patch_width, columns)
    height = _overlap(y[shown], vision.patch_height, rows)
    # Not of what the crop leaves of it: half of a letter of 30 pixels can be read.
    is_read = placed.heights[shown] * scale[1] >= data.min_token_height
    # [rows, columns]: the area of a box in a patch is a product, since patches are cells of a grid,
    # and the sum over boxes a product of matrices.
    unread = (height[~is_read].T @ width[~is_read]).ravel()
    # [M, rows] and [M, columns] give [M, P].
    read = height[is_read]
    covered = (read.T @ width[is_read]).ravel()
    is_at_centre = data.label_unit == "letter"
    if is_at_centre:
        middles = ((boxes[:, 0] + boxes[:, 2]) / 2)[shown][is_read]
        sloped = _at((middles - crop[0]) * scale[0], vision.patch_width, columns, data.label_slope)
        # Of a crop that ends before its tile does, what lies beyond is another tile's.
        sloped[middles >= crop[2]] = 0
    else:
        sloped = _overlap(x[shown][is_read], vision.patch_width, columns, data.label_slope)
    areas = (read[:, :, None] * sloped[:, None, :]).reshape(len(read), vision.num_patches)
    ids, areas = _sum_of_equal(placed.ids[shown][is_read], areas)
    # The uncovered rest of a line within the patch is space, so that labels tell how far the text
    # reaches. `height.max(0)`, [rows], is the height of the highest token in a row of patches.
    line = np.repeat(height.max(0, initial=0) * vision.patch_width, columns)
    rest = np.maximum(line - areas.sum(0) - unread, 0)
    # A letter that has its middle here stands for all of the patch.
    rest = np.where(areas.any(0), 0, 1) if is_at_centre else rest
    has_text = covered >= MIN_COVERED * patch_area
    ids = np.append(ids, space_id)
    areas = np.vstack([areas * has_text, np.where(has_text, rest, 1)])
    top_ids, top_areas = _largest(ids, areas, data.max_patch_labels, space_id)
    return top_ids, top_areas, covered / patch_area, unread / patch_area


def _sum_of_equal(ids: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns different ids [d] and the sum of the areas of each [d, P], of sorted ids [M] and
    their areas [M, P]: a token that occurs twice in a patch is one label."""
    if not len(ids):
        return ids, areas
    # Equal ids are neighbours, and reduceat sums each run of them.
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    return ids[starts], np.add.reduceat(areas, starts, axis=0)


def _largest(
    ids: np.ndarray, areas: np.ndarray, count: int, space_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of the largest areas in each patch, int32 [P, count], and these, float32 [P,
    count]; where there are fewer, spaces of area 0. `areas` [d, P] is used up."""
    every_patch = np.arange(areas.shape[1])
    top_ids = np.full((count, len(every_patch)), space_id, np.int32)
    top_areas = np.zeros(top_ids.shape, np.float32)
    # k rounds of argmax are cheaper than a sort, as k is small, and of equal areas the smallest id
    # is always first (but for the space, which is last).
    for rank in range(min(count, len(ids))):
        largest = areas.argmax(0)
        top_areas[rank] = areas[largest, every_patch]
        top_ids[rank] = np.where(top_areas[rank] > 0, ids[largest], space_id)
        areas[largest, every_patch] = 0
    return top_ids.T, top_areas.T


def _overlap(spans: np.ndarray, size: int, count: int, slope: float = 0.0) -> np.ndarray:
    """Returns the length of each span [M, 2] within each of `count` cells of `size`, [M, count];
    with a slope the left of a cell counts for more of it than the right, the whole as before."""
    starts = np.arange(count, dtype=np.float32) * size
    begin = np.clip(spans[:, :1] - starts, 0, size)
    end = np.clip(spans[:, 1:] - starts, 0, size)
    # The integral of 1 + slope * (1 - 2 u / size) over u.
    return (end - begin) * (1 + slope * (1 - (begin + end) / size))


def _at(middles: np.ndarray, size: int, count: int, slope: float) -> np.ndarray:
    """Returns 1 for the one of `count` cells of `size` in which each middle [M] lies, [M, count];
    with a slope more at the left of a cell, and less at its right."""
    cells = np.floor(middles / size)
    within = middles / size - cells
    weights = 1 + slope * (1 - 2 * within)
    # Beyond the crop a middle is in no cell: the letter is another tile's.
    return (cells[:, None] == np.arange(count)) * weights[:, None].astype(np.float32)
