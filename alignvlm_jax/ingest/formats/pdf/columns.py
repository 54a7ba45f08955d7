"""Columns of text that a PDF page writes line by line across them."""

import itertools
import statistics

from alignvlm_jax.data.labels import is_from_the_right
from alignvlm_jax.ingest.formats.pdf.bidi import Line
from alignvlm_jax.ingest.formats.pdf.words import gap

MIN_GUTTER = 1.5
"""Smallest gap between two columns, in ems."""
MIN_LINES = 4
"""Fewest lines on both sides of a gap that parts columns of text."""
KINDS = ((4.0, 0.6), (2.5, 0.9))
"""Fewest words a line in the mean, and smallest mean width of the lines as a fraction of the
widest, of text in columns. With fewer words or more ragged it is a table, which is read across."""
MAX_PITCH = 2
"""Largest distance from line to line, in ems, where only one column goes on."""
FIXED_PITCH = 0.03
"""Largest difference between the widths of characters, in ems, of a font for code."""
MIN_CODE = 3
"""Fewest characters by which such a font is told."""

Gap = tuple[float, float]
"""Where a gap starts and stops."""


def part_columns(lines: list[Line], is_tabular: list[bool]) -> list[Line]:
    """Returns lines with those that are written across two columns parted, and read column by
    column.

    Args:
      lines: the lines of a page, in the order of its content.
      is_tabular: which of them are of tables.
    """
    gaps = [
        [] if tabular or _is_odd(line) or is_code(line) else _gaps(line)
        for line, tabular in zip(lines, is_tabular, strict=True)
    ]
    ordered: list[Line] = []
    start = 0
    while start < len(lines):
        stop, shared = _run(lines, gaps, start)
        sides = _sides(lines[start:stop], shared)
        # Else it is a table, or words of a line that happen to be far apart.
        if all(map(_is_column, sides)):
            for side in sides:
                # A side may be two columns once more.
                ordered += part_columns(side, [False] * len(side))
        else:
            stop = start + 1
            ordered.append(lines[start])
        start = stop
    return ordered


def is_code(line: Line) -> bool:
    """Whether all characters of a line are equally wide, as in fonts for code."""
    return sum(len(placed.word.text) for placed in line) >= MIN_CODE and pitch(line) > 0


def pitch(line: Line) -> float:
    """Returns the width, in ems, of the characters of a line; 0 if they are not equally wide."""
    widths = [
        (b - a) / placed.em
        for placed in line
        if placed.word.edges and placed.em
        for a, b in itertools.pairwise(placed.word.edges)
    ]
    is_even = bool(widths) and max(widths) - min(widths) < FIXED_PITCH
    return statistics.fmean(widths) if is_even else 0.0


def _run(lines: list[Line], gaps: list[list[Gap]], start: int) -> tuple[int, Gap]:
    """Returns where a run of lines stops whose gaps have something in common, and that.

    Lines on one side alone belong to it, where they follow closely: a column may have a short line,
    or be the longer one.
    """
    shared = gaps[start]
    stop = start + 1
    while shared and stop < len(lines):
        line = lines[stop]
        step = line[0].word.box[1] - lines[stop - 1][0].word.box[1]
        common = [both for a in shared for b in gaps[stop] if (both := _common(a, b))]
        # As long as several gaps are left it is open which one parts columns.
        is_aside = len(shared) == 1 and (
            line[-1].word.box[2] <= shared[0][0] or line[0].word.box[0] >= shared[0][1]
        )
        if step <= 0 or not (common or (is_aside and step <= MAX_PITCH * line[0].em)):
            break
        shared = common or shared
        stop += 1
    return stop, max(shared, key=lambda gap: gap[1] - gap[0], default=(0.0, 0.0))


def _is_odd(line: Line) -> bool:
    """Whether a line does not go from left to right."""
    return any(placed.is_vertical or is_from_the_right(placed.word.text) for placed in line)


def _gaps(line: Line) -> list[Gap]:
    """Returns the gaps in a line that may part columns."""
    return [
        (a.word.box[2], b.word.box[0])
        for a, b in itertools.pairwise(line)
        if gap(a, b) > MIN_GUTTER
    ]


def _common(a: Gap, b: Gap) -> Gap | None:
    start = max(a[0], b[0])
    stop = min(a[1], b[1])
    return (start, stop) if start < stop else None


def _sides(lines: list[Line], gap: Gap) -> tuple[list[Line], list[Line]]:
    """Returns the parts of lines to the left and to the right of a gap."""
    middle = sum(gap) / 2
    left = [[placed for placed in line if placed.word.box[0] < middle] for line in lines]
    right = [[placed for placed in line if placed.word.box[0] >= middle] for line in lines]
    return list(filter(None, left)), list(filter(None, right))


def _is_column(lines: list[Line]) -> bool:
    """Whether lines are of text: of several words, and most of them nearly full."""
    if len(lines) < MIN_LINES:
        return False
    widths = [line[-1].word.box[2] - line[0].word.box[0] for line in lines]
    num_words = statistics.mean(len(line) for line in lines)
    filled = statistics.mean(widths) / max(widths)
    return any(num_words >= words and filled >= width for words, width in KINDS)
