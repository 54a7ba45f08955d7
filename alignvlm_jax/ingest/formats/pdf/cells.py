"""The texts of the cells of a table, and whether its first row is a head."""

import bisect
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data.record import Box
from alignvlm_jax.ingest.formats.pdf.bidi import in_order
from alignvlm_jax.ingest.formats.pdf.tables import Table
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord

# What a word that is hyphenated at the end of a line leaves in the text of a cell.
BROKEN = "- "
MAX_EM_RATIO = 1.3
"""Largest ratio of the sizes of letters in a cell that is asked about; with smaller ones it has an
index or a footnote's number, which reads as if it belonged to the text."""
MIN_FILL = 8
"""Smallest difference, in gray levels of 255, between the background of a head and of its table."""
MIN_LINES_ABOVE = 2
"""Lines above a table from which it begins on its page; others may go on from the page before."""

MARGIN = 0.08
"""Fraction of a page's height, at its top and bottom, that holds running heads and page numbers."""
DIGIT = re.compile(r"\d")


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
      text: its lines, joined.
      is_certain: whether the text is one entry and can be quoted: it is not several short lines, no
        word of it is broken, and nothing in it is raised or cannot be read.
      is_bold: whether all its words are bold.
    """

    text: str
    is_certain: bool
    is_bold: bool


class Cells(NamedTuple):
    """The cells of a table.

    Attributes:
      head: the cells of its first row, if that names the columns; else None.
      body: the other rows.
    """

    head: list[Cell] | None
    body: list[list[Cell]]


def read_cells(
    words: list[PlacedWord], unreadable: list[Box], table: Table, gray: np.ndarray
) -> Cells | None:
    """Returns the cells of a table; None if it is not plain which cell is in which row.

    Args:
      words: the words of the page.
      unreadable: boxes of words that the PDF does not spell.
      table: the table.
      gray: uint8 [Y, X], the page as it is drawn.
    """
    if not table.is_simple:
        return None
    # [rows][columns][words]: n + 1 coordinates bound n rows or columns.
    held: list[list[list[PlacedWord]]] = [[[] for _ in table.xs[1:]] for _ in table.ys[1:]]
    for placed in words:
        if at := find_cell(placed.word.box, table):
            box = placed.word.box
            # A word over a rule: what looks like a column is none.
            if box[0] < table.xs[at[1]] - placed.em or box[2] > table.xs[at[1] + 1] + placed.em:
                return None
            held[at[0]][at[1]].append(placed)
    if any(map(_has_lines_across, held)):
        return None
    bad = {at for box in unreadable if (at := find_cell(box, table))}
    rows = [
        [
            _read_cell(cell, x1 - x0, (i, j) not in bad)
            for j, (cell, (x0, x1)) in enumerate(
                zip(row, itertools.pairwise(table.xs), strict=True)
            )
        ]
        for i, row in enumerate(held)
    ]
    # By what is drawn first; the kinds of texts are weaker evidence.
    num_heads = _num_heads(rows, table, gray)
    # Between two rows that look like heads it is not plain which names a column.
    if num_heads > 1:
        return None
    if num_heads == 0 and _begins(table, words) and _differs(rows):
        num_heads = 1
    head = rows[0] if num_heads else None
    if head and any(
        cell.text and cell.text in {row[i].text for row in rows[1:]} for i, cell in enumerate(head)
    ):
        return None
    return Cells(head, rows[num_heads:])


def is_whole(table: Table, words: list[PlacedWord], height: int) -> bool:
    """Whether text stands above and below a table, other than in the margins of a page of some
    height: it neither goes on from the page before nor on the next."""
    top = MARGIN * height
    bottom = (1 - MARGIN) * height
    boxes = [placed.word.box for placed in words]
    is_begun = any(top < box[1] and box[3] <= table.ys[0] for box in boxes)
    return is_begun and any(table.ys[-1] <= box[1] and box[3] < bottom for box in boxes)


def find_cell(box: Box, table: Table) -> tuple[int, int] | None:
    """Returns the row and column of the cell that a box's centre lies in; None if outside."""
    row = bisect.bisect(table.ys, (box[1] + box[3]) / 2) - 1
    column = bisect.bisect(table.xs, (box[0] + box[2]) / 2) - 1
    is_inside = 0 <= row < len(table.ys) - 1 and 0 <= column < len(table.xs) - 1
    return (row, column) if is_inside else None


def join_lines(lines: Sequence[str]) -> str:
    """Returns lines as one, with spaces between them but where scripts have none."""
    text = ""
    for line in lines:
        is_joined = text and line and _is_wide(text[-1]) and _is_wide(line[0])
        text += line if is_joined or not text else f" {line}"
    return text


def by_baselines(words: list[PlacedWord]) -> list[list[PlacedWord]]:
    """Returns words in lines by position alone: from the top, each from left to right."""
    lines: list[list[PlacedWord]] = []
    for placed in sorted(words, key=lambda placed: placed.word.box[1] + placed.word.box[3]):
        # Compared with the line's first word, not its last: else a slanted line, or one with
        # growing indices, would drift down into the next.
        if lines and is_on_baseline_of(lines[-1][0].word.box, placed.word.box, across=1):
            lines[-1].append(placed)
        else:
            lines.append([placed])
    return lines


def is_on_baseline_of(a: Box, b: Box, across: int) -> bool:
    """Whether two boxes overlap on axis `across` by half the extent of the smaller one, or more."""
    overlap = min(a[across + 2], b[across + 2]) - max(a[across], b[across])
    return overlap >= 0.5 * min(a[across + 2] - a[across], b[across + 2] - b[across])


def _is_wide(character: str) -> bool:
    """Whether a character is of a script that has no spaces, or of its punctuation."""
    return unicodedata.east_asian_width(character) in ("W", "F")


def _read_cell(words: list[PlacedWord], width: float, is_readable: bool) -> Cell:
    """Returns a cell with some words.

    Args:
      words: its words.
      width: of its column.
      is_readable: whether these are all words in it.
    """
    lines = [in_order(line) for line in by_baselines(words)]
    text = join_lines([" ".join(placed.word.text for placed in line) for line in lines])
    # An index or a number of a footnote is smaller than the text that it stands at.
    ems = [placed.em for placed in words]
    is_even = not ems or max(ems) <= MAX_EM_RATIO * max(min(ems), 1e-6)
    is_certain = is_readable and is_even and BROKEN not in text and _is_wrapped(lines, width)
    return Cell(text, is_certain, bool(words) and all(placed.is_bold for placed in words))


def _is_wrapped(lines: list[list[PlacedWord]], width: float) -> bool:
    """Whether lines are one text that is broken where the next word would not fit.

    Else they may be entries of their own, one below the other.
    """
    for line, following in itertools.pairwise(lines):
        em = line[-1].em
        used = sum(placed.word.box[2] - placed.word.box[0] + em / 4 for placed in line)
        word = following[0].word.box
        # A cell has margins, and lines are not filled to the last letter.
        if used + word[2] - word[0] + 3 * em < width:
            return False
    return True


def _has_lines_across(row: list[list[PlacedWord]]) -> bool:
    """Whether all cells of a row have the same number of lines, and several: each is a row."""
    counts = {len(by_baselines(cell)) for cell in row if cell}
    return len(counts) == 1 and max(counts) > 1 and sum(map(bool, row)) > 1


def _num_heads(rows: list[list[Cell]], table: Table, gray: np.ndarray) -> int:
    """Returns how many of the first rows look like a head: bold or on another ground than the
    rest, or above a rule that no other row has."""
    is_full = [all(cell.text for cell in row) for row in rows]
    is_bold = [all(cell.is_bold or not cell.text for cell in row) and any(c.text for c in row)
               for row in rows]  # fmt: skip
    num_bold = len(list(itertools.takewhile(bool, is_bold)))
    # A table that is bold throughout, or in many rows, has no head by that.
    if not any(is_bold[num_bold:]) and 0 < num_bold < len(rows) and is_full[0]:
        return num_bold
    grounds = [_ground(gray, table, row) for row in range(len(rows))]
    is_other = [abs(ground - grounds[-1]) >= MIN_FILL for ground in grounds]
    num_other = len(list(itertools.takewhile(bool, is_other)))
    # In striped tables every second row is on the other ground.
    if not any(is_other[num_other:]) and 0 < num_other < len(rows) and is_full[0]:
        return num_other
    return int(table.is_headed and is_full[0])


def _ground(gray: np.ndarray, table: Table, row: int) -> int:
    """Returns the most frequent gray level in a row of a table."""
    top, bottom = (int(y) for y in table.ys[row : row + 2])
    left = int(table.xs[0])
    right = int(table.xs[-1])
    # Without the rules around it, which may be wide.
    levels = gray[top + 2 : bottom - 1, left + 2 : right - 1]
    return int(np.bincount(levels.ravel(), minlength=1).argmax()) if levels.size else 255


def _begins(table: Table, words: list[PlacedWord]) -> bool:
    """Whether some text stands above a table, so that it does not go on from the page before."""
    above = [placed for placed in words if placed.word.box[3] < table.ys[0]]
    return len(by_baselines(above)) >= MIN_LINES_ABOVE


def _differs(rows: list[list[Cell]]) -> bool:
    """Whether the first row is of another kind than the others: words above a column of numbers."""
    head, *body = rows
    if not all(cell.text and not DIGIT.search(cell.text) for cell in head):
        return False
    for column, cell in enumerate(head):
        below = [row[column].text for row in body if row[column].text]
        is_named = sum(map(str.isalpha, cell.text)) >= 2
        if is_named and len(below) >= 2 and all(text[0] in "+-0123456789.,−" and DIGIT.search(text)
                                                for text in below):  # fmt: skip
            return True
    return False
