"""`pdf`: PDF files.

A page is a record: its image, its words in reading order, and questions about its ruled tables.
"""

import dataclasses
import functools
import itertools
import posixpath
import threading
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.ingest.formats.base import Raw, Reject, Rejection, Unit, option
from alignvlm_jax.ingest.formats.pdf import drawing
from alignvlm_jax.ingest.formats.pdf import lines as lines_lib
from alignvlm_jax.ingest.formats.pdf import tables as tables_lib
from alignvlm_jax.ingest.formats.pdf import words as words_lib
from alignvlm_jax.ingest.formats.pdf.tables import Table
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord

MAX_DPI = 600
PAGES_PER_UNIT = 64
WHOLE_BYTES = 1 << 20
"""A file that is smaller is one unit; only a larger one has to be opened to be cut."""
MAX_REMOTE_BYTES = 1 << 29
"""Of a file in a bucket, which is held in memory."""
MAX_UNREADABLE = 0.1
"""Fraction of a page's words that may be drawn but have no Unicode."""
HOLDOUTS = ("document", "page")

_pdfium = threading.Lock()  # it serves one thread at a time, and a runner may have several


@dataclasses.dataclass(frozen=True)
class Pages(Unit):
    """Pages of a file, from 0. `name` is the file's path in the source, without its suffix."""

    name: str = ""


@dataclasses.dataclass(frozen=True)
class Pdf:
    """A PDF file, or a folder of them."""

    dpi: int = option(100, "pixels an inch at which pages are drawn")
    holdout_by: str = option("document", "what is held out together: document (a file), or page")

    def __post_init__(self):
        if not 1 <= self.dpi <= MAX_DPI:
            raise UserError(f"--dpi={self.dpi} is not 1 to {MAX_DPI}")
        if self.holdout_by not in HOLDOUTS:
            raise UserError(f"--holdout_by={self.holdout_by}{nearest(self.holdout_by, HOLDOUTS)}")

    def units(self, source: str) -> list[Unit]:
        """See Format. Large files are opened, to cut them into ranges of pages that workers share.

        Raises:
          UserError: also where a single file is to be held out by documents.
        """
        paths = filesystem.list_files(source, (".pdf",))
        if len(paths) == 1 and self.holdout_by == "document":
            raise UserError(
                f"{source} is one document: none could be held out; --holdout_by=page splits it "
                "by pages"
            )
        units = []
        for path in paths:
            inside = path[len(source) :].strip("/") if path != source else posixpath.basename(path)
            stops = [-1]
            if filesystem.size(path) > WHOLE_BYTES:
                num_pages = _num_pages(path)
                stops = [*range(PAGES_PER_UNIT, num_pages, PAGES_PER_UNIT), num_pages or -1]
            units += [
                Pages(path, start, stop, posixpath.splitext(inside)[0])
                for start, stop in itertools.pairwise([0, *stops])
            ]
        return units

    def raws(self, unit: Pages) -> Iterator[Raw | Rejection]:
        """See Format."""
        try:
            with _pdfium:
                stop = len(_open(unit.path)) if unit.stop < 0 else unit.stop
        except Reject as err:
            yield Rejection(unit.name, str(err))
            return
        for page in range(unit.start, stop):
            name = f"{unit.name}-{page + 1:04d}"
            document = name if self.holdout_by == "page" else unit.name
            yield Raw(name, document, {"path": unit.path, "page": page})

    def record(self, raw: Raw) -> Record:
        """See Format."""
        with _pdfium, drawing.open_page(_open(raw.fields["path"]), raw.fields["page"]) as page:
            drawn = drawing.draw(page, self.dpi)
            words, num_unreadable = words_lib.read_words(
                page, drawn.to_pixels, np.asarray(drawn.image.convert("L"))
            )
            tables = tables_lib.find_tables(page, drawn.to_pixels, drawn.scale)
        unpadded_vocab_size = len(words) + num_unreadable
        if num_unreadable > MAX_UNREADABLE * unpadded_vocab_size:
            raise Reject(f"words without Unicode ({num_unreadable:,} of {unpadded_vocab_size:,})")
        lines = lines_lib.read_lines(words, tables)
        turns = _turns(words, tables)
        return Record(raw.id, "pdf", (drawing.encode(drawn.image),), turns, (lines,))


@functools.lru_cache(maxsize=2)
def _open(path: str) -> pypdfium2.PdfDocument:
    """Opens a file once for all of its pages; Reject where it is none that can be read."""
    try:
        if filesystem.is_remote(path):
            return pypdfium2.PdfDocument(filesystem.read(path, MAX_REMOTE_BYTES))
        return pypdfium2.PdfDocument(path)  # which reads what it needs, of a file of any size
    except pypdfium2.PdfiumError as err:
        if err.err_code == pdfium.FPDF_ERR_PASSWORD:
            raise Reject("a PDF that a password protects") from err
        raise Reject(f"no PDF, or a damaged one ({err})") from err
    except (OSError, ValueError) as err:
        raise Reject(f"a file that cannot be read ({err})") from err


def _num_pages(path: str) -> int:
    """0 where a file cannot be read: `raws` says why."""
    try:
        with _pdfium:
            return len(_open(path))
    except Reject:
        return 0


def _turns(words: list[PlacedWord], tables: list[Table]) -> tuple[Turn, ...]:
    """The questions about all tables of a page, without those that two of them answer
    differently."""
    answers: dict[str, set[str]] = defaultdict(set)
    for table in tables:
        for turn in tables_lib.questions(lines_lib.read_cells(words, table)):
            answers[turn.question].update(turn.answers)
    return tuple(
        Turn(question, tuple(found)) for question, found in answers.items() if len(found) == 1
    )
