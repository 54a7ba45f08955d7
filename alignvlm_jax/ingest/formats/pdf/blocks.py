"""Blocks of lines on a PDF page, and which of them comes first."""

import itertools

from alignvlm_jax.data.record import Box
from alignvlm_jax.ingest.formats.pdf.bidi import Line
from alignvlm_jax.ingest.formats.pdf.cells import is_on_baseline_of
from alignvlm_jax.ingest.formats.pdf.words import SIDEWAYS, union

Block = list[Line]

MAX_BLOCK_GAP = 0.5
"""Largest gap between two lines of a block, as a fraction of the height of the page's text."""
MAX_BLOCKS = 500
"""Most blocks that are sorted, because the time grows with the square of their number.

A page with more of them keeps the order of its content.
"""
MIN_LABELS = 4
"""Fewest short blocks that follow each other in the content and are taken for a figure's texts."""
MAX_LABEL_LINES = 2
MAX_LABEL_WORDS = 4
"""Most lines of a label in a figure, and words of such a line."""


def sort_figures(lines: list[Line]) -> list[Line]:
    """Returns lines with the texts of figures from top to bottom and from left to right.

    Programs write them in the order in which they were drawn, which nobody sees. They are told by
    many short blocks that follow each other.
    """
    ordered: list[Line] = []
    # A paragraph between two labels ends a figure.
    for is_label, group in itertools.groupby(_blocks(lines), _is_label):
        blocks = list(group)
        flat = [line for block in blocks for line in block]
        ordered += _by_position(flat) if is_label and len(blocks) >= MIN_LABELS else flat
    return ordered


def from_the_top(lines: list[Line]) -> list[Block]:
    """Returns the lines as blocks, so that no block comes before one that stands wholly above it.

    A block ends where the content goes on further up the page, as in the next column, or across
    most of it. Apart from that, blocks keep the order of the content; so do all lines of a page
    that is shown sideways, where what is above says nothing about what comes first.
    """
    words = [placed for line in lines for placed in line]
    if sum(placed.is_vertical for placed in words) > SIDEWAYS * len(words):
        return [lines]
    blocks = _blocks(lines)
    if len(blocks) > MAX_BLOCKS:
        return blocks
    # Always the earliest block with none above it: a topological sort that moves no more than it
    # has to.
    waiting = [(bounds(block), block) for block in blocks]
    ordered = []
    while waiting:
        is_first = (not any(_is_above(*other, *one) for other in waiting) for one in waiting)
        # A box of no height, at the page's border, stands above itself: then no block is first, and
        # without a default the loop would not end.
        first = next((i for i, found in enumerate(is_first) if found), 0)
        ordered.append(waiting.pop(first)[1])
    return ordered


def bounds(block: Block) -> Box:
    """Returns the smallest box around all words of a block."""
    return union([placed.word.box for line in block for placed in line])


def _blocks(lines: list[Line]) -> list[Block]:
    """Returns lines in blocks, which end where the content goes up, or down across most of the
    page."""
    blocks: list[Block] = []
    # Header and footer are often written one after the other, last of all: one block of them would
    # stand above nothing.
    _, top, _, bottom = bounds(lines) if lines else (0, 0, 0, 0)
    most = MAX_BLOCK_GAP * (bottom - top)
    for line in lines:
        last = blocks[-1][-1][0].word.box if blocks else None
        start = line[0].word.box[1]
        if last and start >= last[1] and start - last[3] <= most:
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def _is_label(block: Block) -> bool:
    return len(block) <= MAX_LABEL_LINES and all(len(line) <= MAX_LABEL_WORDS for line in block)


def _by_position(lines: list[Line]) -> list[Line]:
    """Returns lines from top to bottom, those on one baseline from left to right."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line[0].word.box[1] + line[0].word.box[3]):
        # Compared with the row's first line: else a rising one would drift into the next.
        if rows and is_on_baseline_of(rows[-1][0][0].word.box, line[0].word.box, across=1):
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line[0].word.box[0])]


def _is_above(box: Box, block: Block, other_box: Box, other: Block) -> bool:
    """Whether a block ends above another one in a column that they share.

    A block of one line, as a page number between two columns, is compared across all columns.
    """
    is_in_column = box[0] < other_box[2] and other_box[0] < box[2]
    return box[3] <= other_box[1] and (is_in_column or len(block) == 1 or len(other) == 1)
