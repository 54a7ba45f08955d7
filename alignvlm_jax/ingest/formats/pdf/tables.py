"""Ruled tables of a PDF page: finds their grids among the drawn rules, and asks for their cells."""

import bisect
import ctypes
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.data.pdf import objects
from alignvlm_jax.data.record import Turn

# Lengths in points.
MAX_RULE_WIDTH = 2.5
SLACK = 1.5
MIN_TABLE_WIDTH = 100
MIN_ROW_HEIGHT = 6
MAX_ROW_HEIGHT = 80
MIN_COLUMN_WIDTH = 5
MIN_ROWS = 3
"""Fewest rows of a table, the head and two more; a grid of fewer is a box."""

MAX_SEGMENTS = 20_000
"""Most path segments of a page whose rules are read; a page with more of them is a drawing."""

# What a word that is hyphenated at the end of a line leaves in the text of a cell.
BROKEN = "- "
MAX_KEY_LENGTH = 40
MAX_ANSWER_LENGTH = 60


class Rule(NamedTuple):
    """A straight line along an axis, in pixels.

    Attributes:
      at: its coordinate on the other axis: y of a horizontal rule, x of a vertical one.
      start: where it starts on its own axis.
      stop: where it stops.
    """

    at: float
    start: float
    stop: float


class Table(NamedTuple):
    """The grid of a table, in pixels.

    Attributes:
      xs: the x coordinates around its columns, one more than there are columns, ascending.
      ys: the y coordinates around its rows, one more than there are rows, ascending.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]


def find_tables(page: pypdfium2.PdfPage, to_pixels: np.ndarray, scale: float) -> list[Table]:
    """Returns the tables whose rows and columns are separated by rules, from top to bottom.

    Tables need no frame: many have no rule at their sides.

    Args:
      page: the page.
      to_pixels: float64 [2, 3], from the page's coordinates to pixels.
      scale: pixels a point.
    """
    horizontal, vertical = _read_rules(page, to_pixels, scale)
    long = [
        rule
        for rule in _joined(horizontal, scale)
        if rule.stop - rule.start > MIN_TABLE_WIDTH * scale
    ]
    # The horizontal rules of a table start and stop at the same x. Which of the distinct ends a
    # rule has is found by bisection, because ends differ by fractions of a pixel.
    starts = _distinct([rule.start for rule in long], scale)
    stops = _distinct([rule.stop for rule in long], scale)
    by_ends = defaultdict(list)
    for rule in long:
        by_ends[bisect.bisect(starts, rule.start), bisect.bisect(stops, rule.stop)].append(rule)
    tables = [table for group in by_ends.values() for table in _grids(group, vertical, scale)]
    return sorted(tables, key=lambda table: (table.ys[0], table.xs[0]))


def questions(rows: list[list[str]]) -> list[Turn]:
    """Returns questions for the cells of a table, each named by its column's head and its row.

    Rows are named by the first column whose cells are all different. Answers of more than
    MAX_ANSWER_LENGTH characters are left out, and so are texts with a word that is broken at a
    hyphen, since it is unknown whether the word keeps it.

    Args:
      rows: texts of the cells by row; the first row is the head.

    Returns:
      The turns; none if heads are missing or repeated, or no column names the rows.
    """
    head, *body = rows
    if not all(map(_is_name, head)) or len(set(head)) < len(head):
        return []
    for key, name in enumerate(head):
        keys = [row[key] for row in body]
        if len(set(keys)) == len(keys) and all(map(_is_name, keys)):
            return [
                Turn(f"In the row where {name} is '{row[key]}', what is {heading}?", (cell,))
                for row in body
                for column, (heading, cell) in enumerate(zip(head, row, strict=True))
                if column != key and 0 < len(cell) <= MAX_ANSWER_LENGTH and BROKEN not in cell
            ]
    return []


def _is_name(cell: str) -> bool:
    """Whether the text of a cell can name a row or column in a question."""
    return 0 < len(cell) <= MAX_KEY_LENGTH and BROKEN not in cell


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
    for top, bottom in itertools.pairwise(_distinct([rule.at for rule in horizontal], scale)):
        is_row = MIN_ROW_HEIGHT * scale < bottom - top < MAX_ROW_HEIGHT * scale
        inset = MIN_COLUMN_WIDTH * scale
        middle = (top + bottom) / 2
        # A vertical rule counts if it crosses the middle of the row; those at the frame do not
        # part columns.
        inner = [
            r.at
            for r in vertical
            if left + inset < r.at < right - inset and r.start < middle < r.stop
        ]
        cuts = tuple(_distinct(inner, scale)) if is_row else ()
        same = len(cuts) == len(columns) and all(
            abs(a - b) < SLACK * scale for a, b in zip(cuts, columns, strict=True)
        )
        if ys and not same:
            # ys has a coordinate more than there are rows.
            if len(ys) > MIN_ROWS:
                yield Table((left, *columns, right), tuple(ys))
            ys = []
        # The columns of a run are those of its first row, so that tiny shifts do not add up.
        if cuts:
            columns = columns if ys else cuts
            ys = [*(ys or [top]), bottom]
    if len(ys) > MIN_ROWS:
        yield Table((left, *columns, right), tuple(ys))


def _read_rules(
    page: pypdfium2.PdfPage, to_pixels: np.ndarray, scale: float
) -> tuple[list[Rule], list[Rule]]:
    """Returns the horizontal and the vertical rules of a page; none if the page is a drawing.

    Rules are lines, the sides of frames, and thin filled boxes, which many programs draw for lines.
    """
    horizontal = []
    vertical = []
    count = 0
    for path, kind, matrix in objects(page, to_pixels):
        if kind != pdfium.FPDF_PAGEOBJ_PATH:
            continue
        count += pdfium.FPDFPath_CountSegments(path)
        if count > MAX_SEGMENTS:
            return [], []
        fill = ctypes.c_int()
        stroke = ctypes.c_int()
        pdfium.FPDFPath_GetDrawMode(path, fill, stroke)
        for points in _subpaths(path, matrix):
            # A filled box has its bounds for a diagonal, which is a line along an axis only if the
            # box is thin.
            if not stroke.value:
                points = np.array([points.min(0), points.max(0)])
            for a, b in itertools.pairwise(points.tolist()):
                # `across` is the axis (0 for x) on which the two ends of such a rule agree.
                for rules, across in ((horizontal, 1), (vertical, 0)):
                    start, stop = sorted((a[1 - across], b[1 - across]))
                    if abs(a[across] - b[across]) <= MAX_RULE_WIDTH * scale < stop - start:
                        rules.append(Rule((a[across] + b[across]) / 2, start, stop))
    return horizontal, vertical


def _subpaths(path, matrix: np.ndarray) -> list[np.ndarray]:
    """Returns the points of each connected run of lines in a path, each float64 [n, 2].

    Curves are taken as lines between their control points.
    """
    subpaths: list[list[np.ndarray]] = []
    x = ctypes.c_float()
    y = ctypes.c_float()
    for i in range(pdfium.FPDFPath_CountSegments(path)):
        segment = pdfium.FPDFPath_GetPathSegment(path, i)
        pdfium.FPDFPathSegment_GetPoint(segment, x, y)
        if pdfium.FPDFPathSegment_GetType(segment) == pdfium.FPDF_SEGMENT_MOVETO or not subpaths:
            subpaths.append([])
        subpaths[-1].append(matrix @ (x.value, y.value, 1))
        if pdfium.FPDFPathSegment_GetClose(segment):
            subpaths[-1].append(subpaths[-1][0])
    return [np.array(points) for points in subpaths]


def _joined(rules: list[Rule], scale: float) -> Iterator[Rule]:
    """Yields rules with touching pieces joined, because many programs draw rules cell by cell."""
    # Pieces of one rule may differ by a fraction of a pixel in `at`: bisection gives the group.
    heights = _distinct([rule.at for rule in rules], scale)
    for _, pieces in itertools.groupby(sorted(rules), lambda rule: bisect.bisect(heights, rule.at)):
        line = None
        for piece in sorted(pieces, key=lambda rule: rule.start):
            if line is not None and piece.start - line.stop <= SLACK * scale:
                line = line._replace(stop=max(line.stop, piece.stop))
                continue
            if line is not None:
                yield line
            line = piece
        yield line


def _distinct(values: list[float], scale: float) -> list[float]:
    """Returns values in ascending order, without those within the slack of the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > SLACK * scale:
            kept.append(value)
    return kept
