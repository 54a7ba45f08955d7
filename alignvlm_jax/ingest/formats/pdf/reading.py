"""What is read of a drawn PDF page: its words, tables and lines."""

from typing import NamedTuple

import numpy as np
import pypdfium2

from alignvlm_jax.data.pdf import Drawn
from alignvlm_jax.data.record import Box, Word
from alignvlm_jax.ingest.formats.pdf.bidi import Line
from alignvlm_jax.ingest.formats.pdf.lines import read_lines
from alignvlm_jax.ingest.formats.pdf.tables import Table, find_tables
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord, read_words


class ReadPage(NamedTuple):
    """What was read of a page.

    Attributes:
      words: its words, in the order of its content.
      unreadable: boxes of words that the PDF does not spell.
      tables: its tables.
      gray: uint8 [Y, X], the page as it is drawn.
    """

    words: list[PlacedWord]
    unreadable: list[Box]
    tables: list[Table]
    gray: np.ndarray

    @property
    def num_words(self) -> int:
        return len(self.words) + len(self.unreadable)

    def lines(self) -> list[Line]:
        """Returns its words by lines, in reading order."""
        return read_lines(self.words, self.tables)


def read(page: pypdfium2.PdfPage, drawn: Drawn) -> ReadPage:
    """Returns what is read of an open page; the caller holds the lock of pdfium."""
    # What cannot be seen in gray cannot be told from its ground.
    gray = np.asarray(drawn.image.convert("L"))
    words, unreadable = read_words(page, drawn.to_pixels, gray)
    tables = find_tables(page, drawn.to_pixels, drawn.scale, words)
    return ReadPage(words, unreadable, tables, gray)


def plain(lines: list[Line]) -> tuple[tuple[Word, ...], ...]:
    """Returns lines as a record has them."""
    return tuple(tuple(placed.word for placed in line) for line in lines)
