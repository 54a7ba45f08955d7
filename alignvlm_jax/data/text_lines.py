"""Text lines of a page, found in its pixels: of pages that were born digital, and of clean scans.

A recursive XY cut: blank rows cut the page into segments, and a segment that is higher than a line
is cut between its lines or at its widest blank column. Lengths below are in letter heights of the
page, about the height of its capitals, which text of any resolution has in common.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

CONTRAST = 56
"""Levels, of 255, by which ink differs from what lies behind it: a grey box is not ink."""
BLOCK = (8, 32)
"""Rows and columns of the blocks that may have a background of their own: flat, as text is."""
FILLED = 0.65
"""Fraction of a block that ink does not reach: with more it is the block's background."""
STRIP = 32  # Columns over which letters are taken together to measure their height.

RULE = 5.5
"""Length from which a straight run of ink is a rule, of a table or a frame, and no stroke."""
HIGH = 2.0  # Height above which a segment is more than one line of the page's usual type.
THIN = 0.15  # Height below which a segment is no text: the rest of a rule, or a speck.
FRAGMENT = 0.55  # Height below which a segment may be part of a line: dots, accents, an underscore.
FRAGMENT_GAP = 0.45  # The largest gap between such a part and its line.
COLUMN_GAP = 0.9  # Width from which blank columns may divide a segment: more than a space.
COLUMN = 10  # Width of the narrowest column of text.
COLUMN_HEIGHT = 8  # Height of the rows of ink that it has at least.
CENTRED = 0.06
"""How far from the middle the gap between two columns may lie, as a fraction of the width."""
NEAR = 4  # Distance from that gap to which text reaches, in most rows of a column.
FULL = 0.5  # Fraction of its rows of ink that do.
VALLEY = 0.25  # Ink of the row between two lines that touch, as a fraction of their fullest rows.
STROKE = 0.3  # Distance from that row, up and down, that few strokes reach.
MAX_STROKES = 0.05  # Their ink, likewise.
HALFWAY = 0.15
"""Distance from the middle within which a cell is centred, as a fraction of the height."""
MARGIN = 0.08  # Margin around a line, as a fraction of its height.


Span = tuple[int, int]
"""Rows or columns: the first, and one after the last."""


class Region(NamedTuple):
    """A part of the page: left, top, right and bottom in pixels."""

    left: int
    top: int
    right: int
    bottom: int


def find(image: Image.Image) -> np.ndarray:
    """Returns the boxes of the text lines of an RGB page in reading order, int32 [n, 4].

    A row of a table is one line; of columns whose lines do not stand side by side, the left one
    comes first. A figure that no blank row or column cuts is one line, whatever its height. Boxes
    have the page's usual ascent and descent at least, so that "aeon" has the size of its
    neighbours, and a margin.
    """
    ink = _ink(np.asarray(image.convert("L")))
    unit = _letter_height(ink)
    if not unit:
        return np.zeros((0, 4), np.int32)
    ink = _without_rules(ink, unit)
    height, width = ink.shape
    lines = list(_cut(ink, Region(0, 0, width, height), unit))
    if not lines:
        return np.zeros((0, 4), np.int32)
    boxes = _with_usual_height(ink, np.array(lines, np.float64), unit)
    margins = MARGIN * (boxes[:, 3:] - boxes[:, 1:2])
    boxes += margins * [-1, -1, 1, 1]
    boxes = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], 1)
    return boxes.clip(0, [width, height, width, height]).astype(np.int32)


def _ink(levels: np.ndarray) -> np.ndarray:
    """Returns which pixels differ from their background, bool [Y, X], of gray levels uint8."""
    page = int(np.bincount(levels.ravel(), minlength=256).argmax())
    ink = _differs(levels, page)
    # Whole blocks only: what is left at the right and bottom has the page's background.
    rows, columns = (size // block for size, block in zip(levels.shape, BLOCK, strict=True))
    inner = np.s_[: rows * BLOCK[0], : columns * BLOCK[1]]
    shape = (rows, BLOCK[0], columns, BLOCK[1])
    blocks = ink[inner].reshape(shape)
    is_filled = blocks.sum((1, 3), dtype=np.int32) > FILLED * BLOCK[0] * BLOCK[1]
    where = np.nonzero(is_filled)
    if len(where[0]):
        # [filled blocks, rows of a block, columns of a block]
        filled = levels[inner].reshape(shape).transpose(0, 2, 1, 3)[where]
        behind = np.median(filled.reshape(len(filled), -1), axis=1)
        blocks.transpose(0, 2, 1, 3)[where] = _differs(filled, behind[:, None, None])
    return ink


def _differs(levels: np.ndarray, background: int | np.ndarray) -> np.ndarray:
    return np.abs(levels.astype(np.int16) - background) > CONTRAST


def _letter_height(ink: np.ndarray) -> float:
    """Returns the typical height of letters in pixels; 0 of a page without any."""
    height, width = ink.shape
    columns = -(-width // STRIP)
    padded = np.zeros((height, columns * STRIP), bool)
    padded[:, :width] = ink
    # Eight pixels at a time, as one number.
    eights = padded.view(np.uint64).reshape(height, columns, -1)
    strips = np.bitwise_or.reduce(eights, axis=2) != 0
    heights = [end - start for strip in strips.T for start, end in runs_of(strip)]
    heights = [one for one in heights if one >= 4]
    return float(np.median(heights)) if heights else 0.0


def runs_of(flags: np.ndarray) -> list[Span]:
    """Returns where runs of true flags [M] begin and end."""
    padded = np.zeros(len(flags) + 2, np.int8)
    padded[1:-1] = flags
    changes = np.flatnonzero(np.diff(padded))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def _without_rules(ink: np.ndarray, unit: float) -> np.ndarray:
    """Returns the ink without its long straight runs, which would join the lines beside them."""
    length = max(8, round(RULE * unit))
    # Columns as rows for the second: shifts of whole rows are several times as fast.
    across = np.ascontiguousarray(ink.T)
    return ink & ~(_long_runs(ink, length) | _long_runs(across, length).T)


def _long_runs(ink: np.ndarray, length: int) -> np.ndarray:
    """Returns the pixels of vertical runs of at least `length`: an opening, by doubling steps."""
    kept = ink
    reach = 1
    while reach < length:
        step = min(reach, length - reach)
        # Now true where a run of `reach + step` begins.
        kept = kept[:-step] & kept[step:]
        reach += step
    full = np.zeros_like(ink)
    full[: len(kept)] = kept
    if not kept.any():
        return full
    reach = 1
    while reach < length:
        step = min(reach, length - reach)
        # NumPy takes care that the two overlap.
        full[step:] |= full[:-step]
        reach += step
    return full


def _cut(ink: np.ndarray, region: Region, unit: float) -> Iterator[Region]:
    """Yields the lines of a region, each as the box of its ink."""
    area = ink[region.top : region.bottom, region.left : region.right]
    for rows, gutter in _in_columns(area, _joined(runs_of(area.any(1)), unit), unit):
        if gutter:
            part = region._replace(top=region.top + rows[0], bottom=region.top + rows[1])
            yield from _cut(ink, part._replace(right=region.left + gutter[0]), unit)
            yield from _cut(ink, part._replace(left=region.left + gutter[1]), unit)
            continue
        top, bottom = rows
        if bottom - top < max(2, THIN * unit):
            continue
        columns = np.flatnonzero(area[top:bottom].any(0))
        segment = Region(
            region.left + int(columns[0]),
            region.top + top,
            region.left + int(columns[-1]) + 1,
            region.top + bottom,
        )
        if bottom - top <= HIGH * unit:
            yield segment
        else:
            yield from _divided(ink, segment, unit)


def _in_columns(
    area: np.ndarray, runs: list[Span], unit: float
) -> Iterator[tuple[Span, Span | None]]:
    """Yields runs of rows, each with None; those of two columns of text as one, with the blank
    columns between the two.

    Rows of a table have blank columns, too: text comes in columns of equal width, which reach the
    gap between them in most rows.
    """
    inked = np.flatnonzero(area.any(0))
    left, right = (int(inked[0]), int(inked[-1]) + 1) if len(inked) else (0, 0)
    if right - left < 2 * COLUMN * unit:
        yield from ((run, None) for run in runs)
        return
    reach = max(unit, CENTRED * (right - left))
    first = round((left + right) / 2 - reach)
    strip = area[:, first : round((left + right) / 2 + reach)]
    start = 0
    while start < len(runs):
        end = start
        inked = np.zeros(strip.shape[1], bool)
        gutter = 0, 0
        # As many runs as leave a gap in the middle.
        while end < len(runs):
            inked = inked | strip[slice(*runs[end])].any(0)
            widest = max(runs_of(~inked), key=lambda gap: gap[1] - gap[0], default=(0, 0))
            if widest[1] - widest[0] < COLUMN_GAP * unit:
                break
            gutter = first + widest[0], first + widest[1]
            end += 1
        found = _text_columns(area[:, :right], runs[start:end], gutter, unit)
        if found is None:
            last = max(end, start + 1)
            yield from ((run, None) for run in runs[start:last])
        else:
            last = start + found[1]
            yield from ((run, None) for run in runs[start : start + found[0]])
            yield (runs[start + found[0]][0], runs[last - 1][1]), gutter
        start = last


def _text_columns(area: np.ndarray, runs: list[Span], gutter: Span, unit: float) -> Span | None:
    """Returns which of some runs of rows are two columns of text beside a gap, as the first and one
    after the last; None where they are none. The right column ends where `area` does."""
    if sum(bottom - top for top, bottom in runs) < COLUMN_HEIGHT * unit:
        return None
    near = round(NEAR * unit)
    # Where the left column ends, and where the right one begins and ends.
    edges = (
        area[:, max(0, gutter[0] - near) : gutter[0]],
        area[:, gutter[1] : gutter[1] + near],
        area[:, -near:],
    )
    # [runs, edges]
    reaches = np.array([[edge[slice(*run)].any() for edge in edges[:2]] for run in runs])
    reaching = np.flatnonzero(reaches.any(1))
    if not len(reaching):
        return None
    first = int(reaching[0])
    last = int(reaching[-1]) + 1
    rows = slice(runs[first][0], runs[last - 1][1])
    left = area[rows, : gutter[0]].any(1)
    right = area[rows, gutter[1] :].any(1)
    for has_ink, edge in zip((left, right, right), edges, strict=True):
        if has_ink.sum() < COLUMN_HEIGHT * unit:
            return None
        # A row of pixels has ink at an edge more seldom than a row of letters.
        if edge[rows].any(1).sum() < FULL * has_ink.sum():
            return None
    return first, last


def _joined(runs: list[Span], unit: float) -> list[Span]:
    """Returns runs of rows with the fragments of lines joined to the nearer neighbour."""
    joined: list[Span] = []
    for number, (top, bottom) in enumerate(runs):
        if joined:
            above = joined[-1]
            gap = top - above[1]
            after = runs[number + 1][0] - bottom if number + 1 < len(runs) else np.inf
            is_fragment = bottom - top < FRAGMENT * unit and gap <= after
            if (
                (is_fragment or above[1] - above[0] < FRAGMENT * unit)
                and gap <= FRAGMENT_GAP * unit
                and bottom - above[0] <= HIGH * unit
            ):
                joined[-1] = above[0], bottom
                continue
        joined.append((top, bottom))
    return joined


def _divided(ink: np.ndarray, segment: Region, unit: float) -> list[Region]:
    """Returns the lines of a segment without a blank row that is higher than a line."""
    area = ink[segment.top : segment.bottom, segment.left : segment.right]
    gaps = [gap for gap in runs_of(~area.any(0)) if gap[1] - gap[0] >= COLUMN_GAP * unit]
    bounds = [0, *(edge for gap in gaps for edge in gap), area.shape[1]]
    cells = list(zip(bounds[::2], bounds[1::2], strict=True))
    row_ink = np.stack([area[:, slice(*cell)].sum(1, dtype=np.int32) for cell in cells])
    # A cell of one line stands in the middle of one of two, and would be cut through.
    is_centred = any(_is_centred(inked, unit) for inked in row_ink > 0)
    rows = [] if is_centred else _valleys(area, unit)
    if rows:
        bounds = [segment.top + row for row in (0, *rows, len(area))]
        parts = (segment._replace(top=a, bottom=b) for a, b in itertools.pairwise(bounds))
        return [line for part in parts for line in _cut(ink, part, unit)]
    if gaps:
        start, end = _between_columns(row_ink > 0, gaps, unit)
        left = segment._replace(right=segment.left + start)
        right = segment._replace(left=segment.left + end)
        lines = [*_cut(ink, left, unit), *_cut(ink, right, unit)]
        # The number of a heading and its text are a line on either side, and one together.
        if len(lines) > 2:
            return lines
    return [segment]


def _between_columns(inked: np.ndarray, gaps: list[Span], unit: float) -> Span:
    """Returns the gap at which to cut a segment of n cells, by the rows where they have ink, bool
    [n, Y], and the gaps between them: the cells of a table's row beside one of several lines stay
    together."""

    def num_on_a_line(cells: np.ndarray) -> int:
        # [n]: how high the first of them are together.
        heights = [np.ptp(np.flatnonzero(rows)) for rows in np.logical_or.accumulate(cells)]
        return int(np.searchsorted(heights, HIGH * unit))

    if first := num_on_a_line(inked):
        return gaps[min(first, len(gaps)) - 1]
    if last := num_on_a_line(inked[::-1]):
        return gaps[-min(last, len(gaps))]
    return max(gaps, key=lambda gap: gap[1] - gap[0])


def _is_centred(inked: np.ndarray, unit: float) -> bool:
    """Whether the rows with ink of a cell, bool [Y], are one line halfway down."""
    rows = np.flatnonzero(inked)
    is_line = np.ptp(rows) <= HIGH * unit
    return bool(is_line and abs((rows[0] + rows[-1]) / 2 / len(inked) - 0.5) < HALFWAY)


def _valleys(area: np.ndarray, unit: float) -> list[int]:
    """Returns the rows between lines that touch, of ink bool [Y, X]; none where the rows are no
    such lines."""
    found: list[int] = []
    row_ink = area.sum(1, dtype=np.int32)
    depth = round(STROKE * unit)
    top = 0
    while len(row_ink) - top > HIGH * unit:
        first = top + round(unit)
        window = row_ink[first : top + round(2.4 * unit)]
        # Of equal rows the middle one.
        least = np.flatnonzero(window == window.min())
        row = first + int(least[len(least) // 2])
        around = row_ink[top:row], row_ink[row : row + round(1.5 * unit)]
        fullest = min(part.max() for part in around)
        # Between the bars of a large E there is little ink, too, and its stem goes on.
        strokes = area[max(0, row - depth) : row + depth + 1].all(0).sum()
        if row_ink[row] > VALLEY * fullest or strokes > MAX_STROKES * fullest:
            return []
        found.append(row)
        top = row
    return found


def _with_usual_height(ink: np.ndarray, boxes: np.ndarray, unit: float) -> np.ndarray:
    """Returns boxes of ink [n, 4] with the usual ascent and descent of the page at least."""
    baselines = np.array([_baseline(ink, box) for box in boxes.astype(int)])
    is_usual = boxes[:, 3] - boxes[:, 1] <= HIGH * unit
    if not is_usual.any():
        return boxes
    # Most lines have ascenders and descenders; some have not, and a few have more.
    ascent = np.percentile((baselines - boxes[:, 1])[is_usual], 60)
    descent = np.percentile((boxes[:, 3] - baselines)[is_usual], 60)
    usual = boxes.copy()
    usual[:, 1] = np.minimum(boxes[:, 1], baselines - ascent)
    usual[:, 3] = np.maximum(boxes[:, 3], baselines + descent)
    return usual


def _baseline(ink: np.ndarray, box: np.ndarray) -> int:
    """Returns the row below the letters without descenders: where ink grows least the fastest."""
    left, top, right, bottom = box
    row_ink = ink[top:bottom, left:right].sum(1, dtype=np.int32)
    drops = row_ink - np.append(row_ink[1:], 0)
    # In the lower part of the line alone: x-height letters have bars and bowls above.
    first = (bottom - top) // 2
    return top + first + int(drops[first:].argmax()) + 1
