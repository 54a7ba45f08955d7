"""The straight lines that are drawn on a PDF page: of frames, between rows and columns."""

import bisect
import ctypes
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.data.pdf import objects

MAX_RULE_WIDTH = 2.5
"""Largest width of a rule in points: what is wider is an area."""
SLACK = 1.5
"""Largest distance, in points, between the ends of rules that are meant to be the same."""
MAX_SEGMENTS = 20_000
"""Most path segments of a page whose rules are read; a page with more of them is a drawing."""


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


def read_rules(
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
        # Counted before they are read: a map has hundreds of thousands.
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


def join_pieces(rules: list[Rule], scale: float) -> Iterator[Rule]:
    """Yields rules with touching pieces joined, because many programs draw rules cell by cell."""
    # Pieces of one rule may differ by a fraction of a pixel in `at`: bisection gives the group.
    heights = distinct([rule.at for rule in rules], scale)
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


def distinct(values: list[float], scale: float) -> list[float]:
    """Returns values in ascending order, without those within the slack of the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > SLACK * scale:
            kept.append(value)
    return kept


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
