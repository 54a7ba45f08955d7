"""Patch labels: the tokens that each patch shows, weighted by their area within the patch."""

import unicodedata
from collections.abc import Iterable

import numpy as np

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.record import Word
from alignvlm_jax.data.tokenizers.base import Tokenizer

MIN_COVERED = 1 / 8
"""Fraction of a patch that text must cover, below which the patch counts as blank."""


def patch_labels(
    lines: Iterable[Iterable[Word]],
    tiles: Tiles,
    tokenizer: Tokenizer,
    vision: VisionConfig,
    max_patch_labels: int,
    blank_weight: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the labels of the patches of one page of n tiles.

    A patch has the k tokens with the largest area in it. The part of a text line's height that no
    token covers counts as a space, and a patch without text is a space alone.

    Args:
      lines: the words of the page, by lines.
      tiles: the tiles of the page.
      tokenizer: encodes the words.
      vision: gives the grid of patches.
      max_patch_labels: k.
      blank_weight: weight in the loss of a patch without text.

    Returns:
      Token ids int32 [n, P, k], the largest areas first; their weights float32 [n, P, k], which sum
      to 1 on every patch (unused labels are spaces of weight 0); and the patches' weights in the
      loss, float32 [n, P]: 1 with text, else `blank_weight`.
    """
    ids, boxes = token_boxes(lines, tokenizer)
    # Sorted once for all tiles: `_tile_labels` sums the areas of equal ids as runs.
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    boxes = boxes[order]
    labels = [
        _tile_labels(ids, boxes, crop, scale, tokenizer.space_id, vision, max_patch_labels)
        for crop, scale in zip(tiles.crops, tiles.scales, strict=True)
    ]
    label_ids, areas, has_text = (np.stack(part) for part in zip(*labels, strict=True))
    # No patch has an area of 0: a blank one has 1, of its space.
    weights = areas / areas.sum(-1, keepdims=True)
    return label_ids, weights, np.where(has_text, np.float32(1), np.float32(blank_weight))


def token_boxes(
    lines: Iterable[Iterable[Word]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of all words, int32 [M], and their boxes on the page, float32 [M, 4].

    A token reaches from the edge where its first character begins to that where its last ends, and
    is as high as its word.
    """
    ids = []
    boxes = []
    for line in lines:
        for word in line:
            left, top, right, bottom = word.box
            # Hebrew and Arabic begin at the right.
            ends = (right, left) if is_from_the_right(word.text) else (left, right)
            # len(text) + 1 edges; without known ones characters are taken as equally wide.
            edges = word.edges or np.linspace(*ends, len(word.text) + 1)
            for token, start, end in tokenizer.token_offsets(word.text):
                ids.append(token)
                sides = sorted((edges[start], edges[end]))
                boxes.append((sides[0], top, sides[1], bottom))
    return np.array(ids, np.int32), np.array(boxes, np.float32).reshape(-1, 4)


def is_from_the_right(text: str) -> bool:
    """Whether a word is of a script that is written from right to left, by its first letter."""
    return unicodedata.bidirectional(text[0]) in ("R", "AL") if text else False


def _tile_labels(ids, boxes, crop, scale, space_id: int, vision: VisionConfig, k: int):
    """Returns the labels of one tile: ids [P, k], areas [P, k], and whether there is text [P].

    Args:
      ids: tokens of the page sorted by id, int32 [M].
      boxes: their boxes on the page, float32 [M, 4].
      crop: the tile's box on the page, float32 [4].
      scale: pixels of the tile a pixel of the page along x and y, float32 [2].
      space_id: the token of a space.
      vision: gives the grid of patches.
      k: labels of a patch.
    """
    rows, columns = vision.patch_grid
    top_ids = np.full((k, vision.num_patches), space_id, np.int32)
    top_areas = np.zeros((k, vision.num_patches), np.float32)
    # [M, 2] each, in pixels of the tile: where a token starts and stops. Clipped to the crop, a
    # token outside of it has no extent.
    x = (boxes[:, 0::2].clip(crop[0], crop[2]) - crop[0]) * scale[0]
    y = (boxes[:, 1::2].clip(crop[1], crop[3]) - crop[1]) * scale[1]
    shown = (x[:, 0] < x[:, 1]) & (y[:, 0] < y[:, 1])
    ids = ids[shown]
    has_text = np.zeros(vision.num_patches, bool)
    if len(ids):
        width = _overlap(x[shown], vision.patch_width, columns)
        height = _overlap(y[shown], vision.patch_height, rows)
        # The area of a box in a patch is a product, since patches are cells of a grid: [M, rows]
        # and [M, columns] give [M, P].
        areas = (height[:, :, None] * width[:, None, :]).reshape(len(ids), -1)
        # A token that occurs twice in a patch is one label. Equal ids are neighbours, and reduceat
        # sums each run of them: areas become [different tokens, P].
        starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
        areas = np.add.reduceat(areas, starts, axis=0)
        ids = ids[starts]
        covered = areas.sum(0)
        has_text = covered >= MIN_COVERED * vision.patch_height * vision.patch_width
        # The uncovered rest of a line within the patch is space, so that labels tell how far the
        # text reaches. `height.max(0)`, [rows], is the height of the highest token in a row of
        # patches.
        line = np.repeat(height.max(0) * vision.patch_width, columns)
        blank = np.where(has_text, np.maximum(line - covered, 0), 1)
        ids = np.append(ids, space_id)
        areas = np.vstack([areas * has_text, blank])
        # k rounds of argmax are cheaper than a sort, as k is small, and of equal areas the smallest
        # id is always first (but for the space, which is last).
        every_patch = np.arange(vision.num_patches)
        for rank in range(min(k, len(ids))):
            largest = areas.argmax(0)
            top_areas[rank] = areas[largest, every_patch]
            top_ids[rank] = np.where(top_areas[rank] > 0, ids[largest], space_id)
            areas[largest, every_patch] = 0
    else:
        top_areas[0] = 1
    return top_ids.T, top_areas.T, has_text


def _overlap(spans: np.ndarray, size: int, count: int) -> np.ndarray:
    """Returns the length of each span [M, 2] within each of `count` cells of `size`, [M, count]."""
    starts = np.arange(count, dtype=np.float32) * size
    return np.maximum(np.minimum(spans[:, 1:], starts + size) - np.maximum(spans[:, :1], starts), 0)
