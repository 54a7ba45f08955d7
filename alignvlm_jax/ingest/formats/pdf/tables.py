"""Ruled tables of a PDF page: their grid, from the rules that are drawn, and questions about their
cells."""

import bisect
import ctypes
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats.pdf.drawing import objects

# Lengths in points.
MAX_RULE_WIDTH = 2.5
SLACK = 1.5
MIN_TABLE_WIDTH = 100
MIN_ROW_HEIGHT = 6
MAX_ROW_HEIGHT = 80
MIN_COLUMN_WIDTH = 5
MIN_ROWS = 3
"""The head and two more; a grid of fewer is a box."""

MAX_SEGMENTS = 20_000
"""What has more of them is a drawing."""

BROKEN = "- "
MAX_KEY_LENGTH = 40
MAX_ANSWER_LENGTH = 60


class Rule(NamedTuple):
    """A straight line along an axis, in pixels: `at` on the other axis."""

    at: float
    start: float
    stop: float


class Table(NamedTuple):
    """The x coordinates around its columns and the y coordinates around its rows, in pixels."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]


def find_tables(page: pypdfium2.PdfPage, to_pixels: np.ndarray, scale: float) -> list[Table]:
    """Finds the tables, from top to bottom, whose rows are parted by horizontal rules and whose
    columns by vertical ones. They need no frame: many have no rule at their sides.

    Args:
      page: of pypdfium2.
      to_pixels: float64 [2, 3], from the page's coordinates to pixels.
      scale: pixels a point.
    """
    horizontal, vertical = _read_rules(page, to_pixels, scale)
    long = [
        rule
        for rule in _joined(horizontal, scale)
        if rule.stop - rule.start > MIN_TABLE_WIDTH * scale
    ]
    starts = _distinct([rule.start for rule in long], scale)
    stops = _distinct([rule.stop for rule in long], scale)
    by_ends = defaultdict(list)
    for rule in long:
        by_ends[bisect.bisect(starts, rule.start), bisect.bisect(stops, rule.stop)].append(rule)
    tables = [table for group in by_ends.values() for table in _grids(group, vertical, scale)]
    return sorted(tables, key=lambda table: (table.ys[0], table.xs[0]))


def questions(rows: list[list[str]]) -> list[Turn]:
    """Asks for the cells of a table by its head and a column that names its rows.

    That is the first column whose cells differ from each other. Answers of more than
    MAX_ANSWER_LENGTH characters are left out, and all texts with a word that is broken at a hyphen:
    nobody can say whether it keeps the hyphen.
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
    return 0 < len(cell) <= MAX_KEY_LENGTH and BROKEN not in cell


def _grids(horizontal: list[Rule], vertical: list[Rule], scale: float) -> Iterator[Table]:
    """Splits the span between rules of equal ends into tables, each with the same columns in all
    rows."""
    left = horizontal[0].start
    right = horizontal[0].stop
    ys: list[float] = []
    columns: tuple[float, ...] = ()
    for top, bottom in itertools.pairwise(_distinct([rule.at for rule in horizontal], scale)):
        is_row = MIN_ROW_HEIGHT * scale < bottom - top < MAX_ROW_HEIGHT * scale
        inset = MIN_COLUMN_WIDTH * scale
        middle = (top + bottom) / 2
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
            if len(ys) > MIN_ROWS:
                yield Table((left, *columns, right), tuple(ys))
            ys = []
        if cuts:
            columns = columns if ys else cuts
            ys = [*(ys or [top]), bottom]
    if len(ys) > MIN_ROWS:
        yield Table((left, *columns, right), tuple(ys))


def _read_rules(
    page: pypdfium2.PdfPage, to_pixels: np.ndarray, scale: float
) -> tuple[list[Rule], list[Rule]]:
    """Returns horizontal and vertical rules: lines, sides of frames, and thin filled boxes, which
    many programs draw for lines."""
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
            # A filled box: its diagonal is a line along an axis if it is thin.
            if not stroke.value:
                points = np.array([points.min(0), points.max(0)])
            for a, b in itertools.pairwise(points.tolist()):
                for rules, across in ((horizontal, 1), (vertical, 0)):
                    start, stop = sorted((a[1 - across], b[1 - across]))
                    if abs(a[across] - b[across]) <= MAX_RULE_WIDTH * scale < stop - start:
                        rules.append(Rule((a[across] + b[across]) / 2, start, stop))
    return horizontal, vertical


def _subpaths(path, matrix: np.ndarray) -> list[np.ndarray]:
    """The points of each run of lines in a path, float64 [k, 2].

    Curves are taken as lines between their points.
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
    """Joins the pieces of rules that are drawn cell by cell."""
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
    """Values in order, without those that follow another within the slack."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > SLACK * scale:
            kept.append(value)
    return kept
