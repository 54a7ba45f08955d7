"""Reading order: joins the words of a PDF page to lines, top to bottom and column by column."""

import bisect

from alignvlm_jax.data.labels import is_from_the_right
from alignvlm_jax.data.record import Box, Word
from alignvlm_jax.ingest.formats.pdf.tables import Table
from alignvlm_jax.ingest.formats.pdf.words import SIDEWAYS, PlacedWord

Line = list[PlacedWord]
Block = list[Line]

MAX_BLOCK_GAP = 0.5
"""Largest gap between two lines of a block, as a fraction of the height of the page's text."""
MAX_BLOCKS = 500
"""Most blocks that are sorted, because the time grows with the square of their number.

A page with more of them keeps the order of its content.
"""


def read_lines(words: list[PlacedWord], tables: list[Table]) -> tuple[tuple[Word, ...], ...]:
    """Returns the words of a page as lines in reading order.

    Words that follow each other in the page's content share a line if they stand side by side on
    one baseline. So columns are read one after the other, since nearly all PDFs have them in this
    order. Tables are read by rows, across all cells. Content that comes late but stands above, as a
    header that is written last, is moved up.

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
    lines = [_in_order(line) for line in lines]
    return tuple(
        tuple(placed.word for placed in line) for block in _from_the_top(lines) for line in block
    )


def read_cells(words: list[PlacedWord], table: Table) -> list[list[str]]:
    """Returns the text of a table's cells by rows, their lines joined by spaces."""
    # [rows][columns][words]: n + 1 coordinates bound n rows or columns.
    cells: list[list[list[PlacedWord]]] = [[[] for _ in table.xs[1:]] for _ in table.ys[1:]]
    for placed in words:
        if at := _find_cell(placed, table):
            cells[at[0]][at[1]].append(placed)
    return [
        [" ".join(placed.word.text for placed in _by_baselines(cell)) for cell in row]
        for row in cells
    ]


def _find_cell(placed: PlacedWord, table: Table) -> tuple[int, int] | None:
    """Returns the row and column of the cell that a word's centre lies in; None if outside."""
    x, y = _centre(placed.word.box)
    row = bisect.bisect(table.ys, y) - 1
    column = bisect.bisect(table.xs, x) - 1
    is_inside = 0 <= row < len(table.ys) - 1 and 0 <= column < len(table.xs) - 1
    return (row, column) if is_inside else None


def _by_rows(words: list[PlacedWord], tables: list[Table]) -> list[PlacedWord]:
    """Returns words with those of each table together, at the place of its first one.

    The words of a table are sorted by rows, and within a row by baselines.
    """
    # [tables][rows][words]. A word outside all tables is a list of its own in `ordered`.
    rows: list[list[list[PlacedWord]]] = [[[] for _ in table.ys[1:]] for table in tables]
    ordered: list[list[PlacedWord]] = []
    for placed in words:
        for table, members in zip(tables, rows, strict=True):
            if at := _find_cell(placed, table):
                # The lists themselves go in, still empty: they fill up as the loop goes on.
                if not any(members):
                    ordered += members
                members[at[0]].append(placed)
                break
        else:
            ordered.append([placed])
    return [
        placed for item in ordered for placed in (_by_baselines(item) if len(item) > 1 else item)
    ]


def _by_baselines(words: list[PlacedWord]) -> list[PlacedWord]:
    """Returns words sorted by position alone: lines from the top, each from left to right."""
    lines: list[Line] = []
    for placed in sorted(words, key=lambda placed: _centre(placed.word.box)[1]):
        # Compared with the line's first word, not its last: else a slanted line, or one with
        # growing indices, would drift down into the next.
        if lines and _is_on_baseline_of(lines[-1][0].word.box, placed.word.box, across=1):
            lines[-1].append(placed)
        else:
            lines.append([placed])
    return [placed for line in lines for placed in _in_order(line)]


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _is_beside(line: Line, placed: PlacedWord) -> bool:
    """Whether a word continues a line, at either end of it: Arabic grows to the left.

    Boxes are (left, top, right, bottom): side `along` is where a line starts and `along + 2` where
    it stops; `across` and `across + 2` are its other two sides.
    """
    across = 0 if placed.is_vertical else 1
    last = line[-1].word.box
    box = placed.word.box
    if line[-1].is_vertical != placed.is_vertical or not _is_on_baseline_of(last, box, across):
        return False
    first = line[0].word.box
    along = 1 - across
    # Half a line's height of overlap is allowed: italics and kerned boxes reach into each other.
    slack = (box[across + 2] - box[across]) / 2
    start = min(first[along], last[along])
    stop = max(first[along + 2], last[along + 2])
    return box[along] >= stop - slack or box[along + 2] <= start + slack


def _is_on_baseline_of(a: Box, b: Box, across: int) -> bool:
    """Whether two boxes overlap on axis `across` by half the extent of the smaller one, or more."""
    overlap = min(a[across + 2], b[across + 2]) - max(a[across], b[across])
    return overlap >= 0.5 * min(a[across + 2] - a[across], b[across + 2] - b[across])


def _in_order(line: Line) -> Line:
    """Returns a line's words from left to right.

    Lines that run up or down the page, and those with Hebrew or Arabic, keep the order of the
    content.
    """
    keeps_order = any(placed.is_vertical or is_from_the_right(placed.word.text) for placed in line)
    return line if keeps_order else sorted(line, key=lambda placed: placed.word.box[0])


def _from_the_top(lines: list[Line]) -> list[Block]:
    """Returns the lines as blocks, so that no block comes before one that stands wholly above it.

    A block ends where the content goes on further up the page, as in the next column, or across
    most of it. Apart from that, blocks keep the order of the content; so do all lines of a page
    that is shown sideways, where what is above says nothing about what comes first.
    """
    words = [placed for line in lines for placed in line]
    if sum(placed.is_vertical for placed in words) > SIDEWAYS * len(words):
        return [lines]
    blocks: list[Block] = []
    # Header and footer are often written one after the other, last of all: one block of them would
    # stand above nothing.
    _, top, _, bottom = _bounds(lines) if lines else (0, 0, 0, 0)
    most = MAX_BLOCK_GAP * (bottom - top)
    for line in lines:
        last = blocks[-1][-1][0].word.box if blocks else None
        start = line[0].word.box[1]
        if last and start >= last[1] and start - last[3] <= most:
            blocks[-1].append(line)
        else:
            blocks.append([line])
    if len(blocks) > MAX_BLOCKS:
        return blocks
    # Always the earliest block with none above it: a topological sort that moves no more than it
    # has to.
    waiting = [(_bounds(block), block) for block in blocks]
    ordered = []
    while waiting:
        is_first = (not any(_is_above(*other, *one) for other in waiting) for one in waiting)
        # A box of no height, at the page's border, stands above itself: then no block is first, and
        # without a default the loop would not end.
        first = next((i for i, found in enumerate(is_first) if found), 0)
        ordered.append(waiting.pop(first)[1])
    return ordered


def _bounds(block: Block) -> Box:
    """Returns the smallest box around all words of a block."""
    lefts, tops, rights, bottoms = zip(
        *(placed.word.box for line in block for placed in line), strict=True
    )
    return min(lefts), min(tops), max(rights), max(bottoms)


def _is_above(box: Box, block: Block, other_box: Box, other: Block) -> bool:
    """Whether a block ends above another one in a column that they share.

    A block of one line, as a page number between two columns, is compared across all columns.
    """
    is_in_column = box[0] < other_box[2] and other_box[0] < box[2]
    return box[3] <= other_box[1] and (is_in_column or len(block) == 1 or len(other) == 1)
