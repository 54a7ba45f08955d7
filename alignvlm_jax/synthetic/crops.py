"""Crops of real pages: a few text lines of one column, with their words and nothing else."""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from PIL import Image

from alignvlm_jax import presets
from alignvlm_jax.data import images, labels, tiling
from alignvlm_jax.data.record import Box, Record, Word

MAX_LINES = 5
MAX_TILES = 12
"""Tiles of the reader's that a record has at most."""
WIDE = tiling.SHORTEST * presets.VISION["lines"].tile_width / presets.VISION["lines"].tile_height
"""Width of a line, in its heights, that a tile of the reader's holds at least."""
MAX_CHARACTERS = 190
"""Characters of the longest record of more than one line, spaces included."""
FULL = 0.7
"""Fraction of records with as many lines as the reader has tiles for: a short one costs as much."""
TRIALS = 6
"""Runs of lines that are tried on a page before another page is."""
CONTRAST = 40
"""Levels, of 255, by which ink differs from what lies behind it."""
LEADING = 1.3
"""Largest distance between two lines of a column, in heights of the upper one."""
OVERHANG = 1
"""Pixels by which the ink of a word may leave its box."""
RULE = 60
"""Pixels from which on a straight horizontal run of ink is a rule."""

Line = tuple[Word, ...]
Crop = tuple[Image.Image, tuple[Line, ...]]


def crop(page: Record, rng: np.random.Generator) -> Crop | None:
    """Returns consecutive lines of a page, of `MAX_TILES` tiles at most, cut out of its image, and
    their words; None where the lines that were tried have ink of others beside them.

    All ink of a crop is within `OVERHANG` of its words' boxes, or a rule; each word has some.
    """
    image = images.decode_image(page.images[0], page.id).convert("L")
    lines = _upright(page.lines[0])
    for _ in range(TRIALS if lines else 0):
        start = int(rng.integers(len(lines)))
        column = _column(lines[start : start + MAX_LINES])
        lengths = [len(" ".join(word.text for word in line)) for line in column]
        chosen = column[: num_lines(map(_width, column), lengths, rng)]
        # Left, top, right and bottom.
        margins = tuple(rng.integers((2, 1, 2, 1), (9, 4, 9, 4)).tolist())
        # Where others are near the margin may be as small as the overhang.
        for margin in (margins, (2, 1, 2, 1)):
            if (cut := _cut(image, chosen, margin)) is not None:
                return cut
    return None


def num_lines(
    widths: Iterable[float],
    lengths: Iterable[int],
    rng: np.random.Generator,
    max_characters: int = MAX_CHARACTERS,
) -> int:
    """Returns how many lines a record has, of lines with these widths in their own heights, and
    lengths in characters: at least one, and most often all that there is room for."""
    # By the height of the letters' boxes: what the reader finds is a little higher, so that a line
    # takes no more tiles than this.
    tiles = np.cumsum([max(1, math.ceil(width / WIDE)) for width in widths])
    has_room = (tiles <= MAX_TILES) & (np.cumsum(list(lengths)) <= max_characters)
    most = max(1, int(has_room.sum()))
    return most if rng.random() < FULL else int(rng.integers(1, most + 1))


def _upright(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Returns the lines that can be read as they stand on the page, without their blank words:
    those with a turned word, as labels of axes are, or with one without area are left out."""
    kept = [tuple(word for word in line if word.text.strip()) for line in lines]
    has_edges = any(word.edges is not None for line in kept for word in line)
    return tuple(
        line
        for line in kept
        if line and all(word.has_area and not _is_turned(word, has_edges) for word in line)
    )


def _is_turned(word: Word, has_edges: bool) -> bool:
    """Whether a word runs up or down the page, on which others have edges or not."""
    if word.edges is not None:
        return False
    # A box of two letters does not tell; but a PDF has edges of all that run from left to right.
    if len(word.text) < 3:
        return has_edges and not labels.is_from_the_right(word.text)
    left, top, right, bottom = word.box
    return bottom - top > labels.VERTICAL * (right - left)


def _width(line: Line) -> float:
    left, top, right, bottom = _around(line)
    return (right - left) / (bottom - top)


def _column(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    """Returns the first of some lines that stand below each other in one column."""
    boxes = [_around(line) for line in lines]
    count = 1
    while count < len(boxes):
        above, below = boxes[count - 1 : count + 1]
        height = above[3] - above[1]
        is_below = above[1] + 0.5 * height < below[1] < above[1] + (1 + LEADING) * height
        overlaps = min(above[2], below[2]) > max(above[0], below[0])
        if not (is_below and overlaps):
            break
        count += 1
    return lines[:count]


def _around(line: Line) -> Box:
    boxes = np.array([word.box for word in line])
    return (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())


def _cut(image: Image.Image, lines: tuple[Line, ...], margins: tuple[int, ...]) -> Crop | None:
    """Returns lines cut out with margins at the left, top, right and bottom; None where a crop
    would leave the page, hold ink that is none of theirs, or cut a word."""
    boxes = np.array([_around(line) for line in lines])
    left, top = (np.floor(boxes[:, :2].min(0)).astype(int) - margins[:2]).tolist()
    right, bottom = (np.ceil(boxes[:, 2:].max(0)).astype(int) + margins[2:]).tolist()
    if min(left, top) < 0 or right > image.width or bottom > image.height:
        return None
    part = image.crop((left, top, right, bottom))
    moved = tuple(tuple(_moved(word, left, top) for word in line) for line in lines)
    levels = np.asarray(part).astype(np.int16)
    ink = np.abs(levels - np.bincount(levels.ravel()).argmax()) > CONTRAST
    others = ink.copy()
    for x0, y0, x1, y1 in (word.box for line in moved for word in line):
        rows = slice(int(y0), int(np.ceil(y1)))
        if not ink[rows, int(x0) : int(np.ceil(x1))].any():
            return None
        rows = slice(max(0, rows.start - OVERHANG), rows.stop + OVERHANG)
        others[rows, max(0, int(x0) - OVERHANG) : int(np.ceil(x1)) + OVERHANG] = False
    # What others have inside a crop comes in through its border: a descender may end in a box.
    others[[0, -1]] |= ink[[0, -1]]
    others[:, [0, -1]] |= ink[:, [0, -1]]
    return None if (others & ~_rules(ink)).any() else (part, moved)


def _rules(ink: np.ndarray) -> np.ndarray:
    """Returns the pixels of horizontal runs of ink of at least `RULE`, of ink bool [Y, X]."""
    rules = np.zeros_like(ink)
    for row in np.flatnonzero(ink.sum(1) >= RULE):
        changes = np.flatnonzero(np.diff(np.concatenate([[0], ink[row].view(np.int8), [0]])))
        for start, end in zip(changes[::2], changes[1::2], strict=True):
            rules[row, start:end] = end - start >= RULE
    return rules


def _moved(word: Word, left: int, top: int) -> Word:
    x0, y0, x1, y1 = word.box
    box = (round(x0 - left, 2), round(y0 - top, 2), round(x1 - left, 2), round(y1 - top, 2))
    edges = word.edges and tuple(round(edge - left, 2) for edge in word.edges)
    return dataclasses.replace(word, box=box, edges=edges)
