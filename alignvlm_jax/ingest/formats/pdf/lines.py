"""Reading order: joins the words of a PDF page to lines, top to bottom and column by column."""

import re

from alignvlm_jax.data.labels import is_from_the_right
from alignvlm_jax.ingest.formats.pdf.bidi import Line, in_order
from alignvlm_jax.ingest.formats.pdf.blocks import from_the_top, sort_figures
from alignvlm_jax.ingest.formats.pdf.cells import by_baselines, find_cell, is_on_baseline_of
from alignvlm_jax.ingest.formats.pdf.columns import part_columns
from alignvlm_jax.ingest.formats.pdf.leaders import without_leaders
from alignvlm_jax.ingest.formats.pdf.tables import Table
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord, gap

BULLET = re.compile(r"[•◦▪▫‣⁃·●○■□◆◇►▶➢✓*–—-]|\(?(\d{1,3}|[a-zA-Z])[.)]")
"""What stands before the items of a list."""
MAX_BULLET_GAP = 4
"""Largest distance between a bullet and its item, in ems."""


def read_lines(words: list[PlacedWord], tables: list[Table]) -> list[Line]:
    """Returns the words of a page as lines in reading order.

    Words that follow each other in the page's content share a line if they stand side by side on
    one baseline. So columns are read one after the other, since nearly all PDFs have them in this
    order; those that are written across each other are told by the gap between them. Tables are
    read by rows, across all cells. Content that comes late but stands above, as a header that is
    written last, is moved up, and the texts of figures are read as they stand.

    Args:
      words: the words, in the order of the page's content.
      tables: the tables of the page.
    """
    lines: list[Line] = []
    for placed in _by_rows(words, tables):
        if lines and _is_beside(lines[-1], placed):
            lines[-1].append(placed)
        else:
            lines.append([placed])
    lines = _with_bullets([in_order(line) for line in lines])
    is_tabular = [any(find_cell(line[0].word.box, table) for table in tables) for line in lines]
    lines = sort_figures(part_columns(lines, is_tabular))
    return [without_leaders(line) for block in from_the_top(lines) for line in block]


def _by_rows(words: list[PlacedWord], tables: list[Table]) -> list[PlacedWord]:
    """Returns words with those of each table together, at the place of its first one.

    The words of a table are sorted by rows, and within a row by baselines.
    """
    # [tables][rows][words]. A word outside all tables is a list of its own in `ordered`.
    rows: list[list[list[PlacedWord]]] = [[[] for _ in table.ys[1:]] for table in tables]
    ordered: list[list[PlacedWord]] = []
    for placed in words:
        for table, members in zip(tables, rows, strict=True):
            if at := find_cell(placed.word.box, table):
                # The lists themselves go in, still empty: they fill up as the loop goes on.
                if not any(members):
                    ordered += members
                members[at[0]].append(placed)
                break
        else:
            ordered.append([placed])
    return [
        placed
        for item in ordered
        for line in (by_baselines(item) if len(item) > 1 else [item])
        for placed in in_order(line)
    ]


def _is_beside(line: Line, placed: PlacedWord) -> bool:
    """Whether a word continues a line, at either end of it: Arabic grows to the left.

    Boxes are (left, top, right, bottom): side `along` is where a line starts and `along + 2` where
    it stops; `across` and `across + 2` are its other two sides.
    """
    across = 0 if placed.is_vertical else 1
    last = line[-1].word.box
    box = placed.word.box
    if line[-1].is_vertical != placed.is_vertical or not is_on_baseline_of(last, box, across):
        return False
    first = line[0].word.box
    along = 1 - across
    # Half a line's height of overlap is allowed: italics and kerned boxes reach into each other.
    slack = (box[across + 2] - box[across]) / 2
    start = min(first[along], last[along])
    stop = max(first[along + 2], last[along + 2])
    if box[along] >= stop - slack or box[along + 2] <= start + slack:
        return True
    # Words from right to left fill a gap in their line.
    return is_from_the_right(placed.word.text) and not any(
        box[0] < other.word.box[2] - slack and box[2] > other.word.box[0] + slack for other in line
    )


def _with_bullets(lines: list[Line]) -> list[Line]:
    """Returns lines with the bullets that a page draws apart put before their items.

    A bullet without an item stays where it is.
    """
    # Items are sought among all lines, also those before a bullet: it is drawn late.
    is_bullet = [len(line) == 1 and bool(BULLET.fullmatch(line[0].word.text)) for line in lines]
    items = [line for line, bullet in zip(lines, is_bullet, strict=True) if not bullet]
    kept = []
    for line, bullet in zip(lines, is_bullet, strict=True):
        beside = [item for item in items if bullet and _is_item(line[0], item)]
        if beside:
            min(beside, key=lambda item: item[0].word.box[0]).insert(0, line[0])
        else:
            kept.append(line)
    return kept


def _is_item(bullet: PlacedWord, line: Line) -> bool:
    """Whether a line begins to the right of a bullet, on its baseline."""
    is_beside = is_on_baseline_of(bullet.word.box, line[0].word.box, across=1)
    return is_beside and not line[0].is_vertical and -0.5 < gap(bullet, line[0]) < MAX_BULLET_GAP
