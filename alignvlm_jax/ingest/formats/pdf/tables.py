"""Tables of a PDF page: finds where their rows and columns lie, among rules and words."""

import bisect
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pypdfium2

from alignvlm_jax.data.record import Box
from alignvlm_jax.ingest.formats.pdf import rules as rules_lib
from alignvlm_jax.ingest.formats.pdf.rules import SLACK, Rule
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord

# Lengths in points.
MIN_TABLE_WIDTH = 100
MIN_ROW_HEIGHT = 6
MAX_ROW_HEIGHT = 80
MIN_COLUMN_WIDTH = 5
MIN_ROWS = 3
"""Fewest rows of a table, the head and two more; a grid of fewer is a box."""
MIN_GUTTER = 0.8
"""Smallest gap, in ems, between columns that no rule parts; words are a third of an em apart."""
MAX_PITCH = 1.35
"""Largest ratio between the distances of lines in a table without rules between its rows: where
they differ more, some rows have several lines."""


class Table(NamedTuple):
    """The grid of a table, in pixels.

    Attributes:
      xs: the x coordinates around its columns, one more than there are columns, ascending.
      ys: the y coordinates around its rows, one more than there are rows, ascending.
      is_simple: whether each of its cells stands in one row and one column, as far as rules tell;
        else cells are merged, or its head has several rows.
      is_headed: whether a rule or two sets its first row apart from the others.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    is_simple: bool = True
    is_headed: bool = False


def find_tables(
    page: pypdfium2.PdfPage, to_pixels: np.ndarray, scale: float, words: list[PlacedWord]
) -> list[Table]:
    """Returns the tables of a page from top to bottom.

    They are those whose rows and columns are separated by rules, and those with rules above, below
    and under their head alone. Tables need no frame: many have no rule at their sides.

    Args:
      page: the page.
      to_pixels: float64 [2, 3], from the page's coordinates to pixels.
      scale: pixels a point.
      words: the words of the page.
    """
    horizontal, vertical = rules_lib.read_rules(page, to_pixels, scale)
    horizontal = list(rules_lib.join_pieces(horizontal, scale))
    long = [rule for rule in horizontal if rule.stop - rule.start > MIN_TABLE_WIDTH * scale]
    # The horizontal rules of a table start and stop at the same x. Which of the distinct ends a
    # rule has is found by bisection, because ends differ by fractions of a pixel.
    starts = rules_lib.distinct([rule.start for rule in long], scale)
    stops = rules_lib.distinct([rule.stop for rule in long], scale)
    by_ends = defaultdict(list)
    for rule in long:
        by_ends[bisect.bisect(starts, rule.start), bisect.bisect(stops, rule.stop)].append(rule)
    tables = []
    for group in by_ends.values():
        for table in _grids(group, vertical, scale):
            is_simple = table.is_simple and not _is_merged(table, horizontal, vertical, scale)
            tables.append(table._replace(is_simple=is_simple))
        tables += _open_tables(group, horizontal, vertical, words, scale)
    return sorted(tables, key=lambda table: (table.ys[0], table.xs[0]))


def _grids(horizontal: list[Rule], vertical: list[Rule], scale: float) -> Iterator[Table]:
    """Yields the tables among horizontal rules of equal ends.

    A table is a run of rows, each between two neighbouring rules, with the same vertical rules.

    Args:
      horizontal: rules that start at one x and stop at one x.
      vertical: all vertical rules of the page.
      scale: pixels a point.
    """
    left = horizontal[0].start
    right = horizontal[0].stop
    ys: list[float] = []
    columns: tuple[float, ...] = ()
    # Whether a row with other columns stands above the run's first one: a part of its head.
    is_below_another = False
    edges = _edges(horizontal, scale)
    doubled = {y for y, is_double in edges if is_double}
    for (top, _), (bottom, _) in itertools.pairwise(edges):
        cuts = _cuts(left, right, top, bottom, vertical, scale)
        same = len(cuts) == len(columns) and all(
            abs(a - b) < SLACK * scale for a, b in zip(cuts, columns, strict=True)
        )
        if ys and not same:
            yield from _table(left, right, columns, ys, is_below_another, doubled)
            is_below_another = bool(cuts)
            ys = []
        elif not ys and not cuts:
            is_below_another = False
        # The columns of a run are those of its first row, so that tiny shifts do not add up.
        if cuts:
            columns = columns if ys else cuts
            ys = [*(ys or [top]), bottom]
    yield from _table(left, right, columns, ys, is_below_another, doubled)


def _table(left, right, columns, ys, is_below_another, doubled) -> Iterator[Table]:
    """Yields the table of a run of rows, if it has enough of them."""
    # ys has a coordinate more than there are rows.
    if len(ys) > MIN_ROWS:
        xs = (left, *columns, right)
        yield Table(xs, tuple(ys), not is_below_another, ys[1] in doubled)


def _edges(horizontal: list[Rule], scale: float) -> list[tuple[float, bool]]:
    """Returns the y of each edge between rows, and whether it is drawn as two rules, as below the
    heads of many tables."""
    edges: list[tuple[float, bool]] = []
    # What is too low for a row is the space between two rules that belong together.
    for y in rules_lib.distinct([rule.at for rule in horizontal], scale):
        if edges and y - edges[-1][0] < MIN_ROW_HEIGHT * scale:
            edges[-1] = (edges[-1][0], True)
        else:
            edges.append((y, False))
    return edges


def _cuts(
    left: float, right: float, top: float, bottom: float, vertical: list[Rule], scale: float
) -> tuple[float, ...]:
    """Returns where vertical rules cut a row, without those at its frame; none if too high."""
    if bottom - top >= MAX_ROW_HEIGHT * scale:
        return ()
    inset = MIN_COLUMN_WIDTH * scale
    middle = (top + bottom) / 2
    inner = [
        rule.at
        for rule in vertical
        if left + inset < rule.at < right - inset and rule.start < middle < rule.stop
    ]
    return tuple(rules_lib.distinct(inner, scale))


def _is_merged(table: Table, horizontal: list[Rule], vertical: list[Rule], scale: float) -> bool:
    """Whether some cells of a table span others: a rule within it ends inside.

    A rule counts if it parts a whole cell; shorter ones underline words, or belong to a figure.
    """
    slack = 2 * SLACK * scale
    for rule in horizontal:
        is_inside = table.ys[0] + slack < rule.at < table.ys[-1] - slack
        if is_inside and min(abs(rule.at - y) for y in table.ys) > MIN_ROW_HEIGHT * scale / 2:
            columns = itertools.pairwise(table.xs)
            if any(rule.start < a + slack and b - slack < rule.stop for a, b in columns):
                return True
    # As for rows: what parts a cell from top to bottom is no column's side.
    for rule in vertical:
        is_inside = table.xs[0] + slack < rule.at < table.xs[-1] - slack
        if is_inside and min(abs(rule.at - x) for x in table.xs) > slack:
            rows = itertools.pairwise(table.ys)
            if any(rule.start < a + slack and b - slack < rule.stop for a, b in rows):
                return True
    return False


def _open_tables(
    group: list[Rule],
    horizontal: list[Rule],
    vertical: list[Rule],
    words: list[PlacedWord],
    scale: float,
) -> Iterator[Table]:
    """Yields the tables with a rule above, one under the head, one below, and no other.

    Each row has a line, and no word reaches over the gaps between columns; what is less plain, as
    a cell of several lines, is left alone.

    Args:
      group: horizontal rules that start at one x and stop at one x.
      horizontal: all horizontal rules of the page.
      vertical: all vertical rules of the page.
      words: the words of the page.
      scale: pixels a point.
    """
    left = group[0].start
    right = group[0].stop
    ys = [y for y, _ in _edges(group, scale)]
    for top, middle, bottom in zip(ys, ys[1:], ys[2:], strict=False):
        slack = SLACK * scale
        # Words may reach over the ends of rules by the width of their sides.
        box = (left - slack, top, right + slack, bottom)
        inside = [rule for rule in horizontal if _crosses(rule.start, rule.stop, rule.at, box, 0)]
        # Those under the head and no others; a head of two rows has pieces of rules within.
        if any(abs(rule.at - middle) > MIN_ROW_HEIGHT * scale for rule in inside):
            continue
        if any(_crosses(rule.start, rule.stop, rule.at, box, 1) for rule in vertical):
            continue
        # Tables of print have a rule below the head that is near: elsewhere it frames a page.
        if middle - top > bottom - middle:
            continue
        held = [placed for placed in words if _is_within(placed.word.box, box)]
        head = [placed for placed in held if placed.word.box[3] < middle + slack]
        body = [placed for placed in held if placed.word.box[3] >= middle + slack]
        lines = _lines(body)
        if len(_lines(head)) != 1 or len(lines) < MIN_ROWS - 1 or _is_uneven(lines):
            continue
        em = statistics.median(placed.em for placed in held)
        gutters = _gutters(held, em)
        # A wide head may close the gap between two columns, and a line that begins further right
        # goes on from the one above.
        if not gutters or not all(_is_row(line, gutters, em) for line in (head, *lines)):
            continue
        edges = [(a[-1].word.box[3] + b[0].word.box[1]) / 2 for a, b in itertools.pairwise(lines)]
        yield Table((left, *gutters, right), (top, middle, *edges, bottom), True, True)


def _crosses(start: float, stop: float, at: float, box: Box, axis: int) -> bool:
    """Whether a rule along an axis (0 for x) lies within a box, also in part."""
    is_beside = box[1 - axis] + 1 < at < box[3 - axis] - 1
    return is_beside and start < box[2 + axis] and stop > box[axis]


def _is_within(box: Box, outer: Box) -> bool:
    """Whether the middle of a box lies in another one."""
    x = (box[0] + box[2]) / 2
    y = (box[1] + box[3]) / 2
    return outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3]


def _lines(words: list[PlacedWord]) -> list[list[PlacedWord]]:
    """Returns words by lines, from the top; lines part where no word is."""
    lines: list[list[PlacedWord]] = []
    bottom = -np.inf
    for placed in sorted(words, key=lambda placed: placed.word.box[1]):
        top = placed.word.box[1]
        # Boxes of lines that follow each other may touch: letters are half as high.
        if lines and top < bottom - 0.5 * placed.em:
            lines[-1].append(placed)
        else:
            lines.append([placed])
            bottom = -np.inf
        bottom = max(bottom, placed.word.box[3])
    return lines


def _is_uneven(lines: list[list[PlacedWord]]) -> bool:
    """Whether lines are not all equally far from each other."""
    tops = [min(placed.word.box[1] for placed in line) for line in lines]
    pitches = [b - a for a, b in itertools.pairwise(tops)]
    return max(pitches) > MAX_PITCH * min(pitches)


def _gutters(words: list[PlacedWord], em: float) -> list[float]:
    """Returns the middles of the gaps between columns, which no word reaches into."""
    gutters = []
    right = np.inf
    for placed in sorted(words, key=lambda placed: placed.word.box[0]):
        if placed.word.box[0] - right > MIN_GUTTER * em:
            gutters.append((right + placed.word.box[0]) / 2)
        right = placed.word.box[2] if right == np.inf else max(right, placed.word.box[2])
    return gutters


def _is_row(line: list[PlacedWord], gutters: list[float], em: float) -> bool:
    """Whether a line begins in the first column, and each gap that is as wide as one between
    columns has one of them."""
    boxes = sorted(placed.word.box for placed in line)
    return boxes[0][0] < gutters[0] and all(
        b[0] - a[2] <= MIN_GUTTER * em or any(a[2] < x < b[0] for x in gutters)
        for a, b in itertools.pairwise(boxes)
    )
