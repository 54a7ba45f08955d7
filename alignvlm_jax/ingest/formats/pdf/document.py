"""The `pdf` format: PDF files, each page of which becomes a record.

A record has the drawn page, its words in reading order, and questions about what it says.
"""

import contextlib
import dataclasses
import functools
import itertools
import posixpath
from collections.abc import Iterator
from typing import ClassVar

import pypdfium2

from alignvlm_jax.data import filesystem
from alignvlm_jax.data import pdf as pdf_lib
from alignvlm_jax.data.pdf import LOCK, Drawn, UnreadablePdf
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.errors import UsageError, nearest
from alignvlm_jax.ingest.formats import files, sandboxed
from alignvlm_jax.ingest.formats.base import (
    Defaults,
    Raw,
    Reject,
    Rejection,
    Unit,
    names_of,
    option,
)
from alignvlm_jax.ingest.formats.ocr import beside
from alignvlm_jax.ingest.formats.ocr.beside import Place
from alignvlm_jax.ingest.formats.pdf import reading
from alignvlm_jax.ingest.formats.pdf.bidi import Line
from alignvlm_jax.ingest.formats.pdf.cells import (
    find_cell,
    is_on_baseline_of,
    is_whole,
    read_cells,
)
from alignvlm_jax.ingest.formats.pdf.indentation import indented
from alignvlm_jax.ingest.formats.pdf.questions import KINDS, make_turns
from alignvlm_jax.ingest.formats.pdf.reading import ReadPage
from alignvlm_jax.ingest.formats.pdf.sentences import read_page, read_text
from alignvlm_jax.ingest.formats.pdf.words import union

MAX_DPI = 600
PAGES_PER_UNIT = 64
WHOLE_BYTES = 1 << 17
"""Size up to which a file is one unit; only a larger one has to be opened to be cut."""
MAX_REMOTE_BYTES = 1 << 29
"""Largest file that is read from a bucket, since it is held in memory."""
MANY_PAGES = 10_000
"""Number of pages above which a file is asked for its last one first."""
MAX_UNREADABLE = 0.1
"""Largest fraction of a page's words that are drawn but have no Unicode."""
HOLDOUTS = ("document", "page")
NO_TEXT = (
    "a scan: give OCR (--ocr=FOLDER), a text layer (`ocrmypdf IN.pdf OUT.pdf`), or questions about "
    "images of its pages (--format=jsonl)"
)


def check_dpi(dpi: int) -> None:
    """Raises UsageError where pages cannot be drawn at so many pixels an inch."""
    if not 1 <= dpi <= MAX_DPI:
        raise UsageError(f"--dpi={dpi} is not 1 to {MAX_DPI}")


@dataclasses.dataclass(frozen=True)
class Pdf(Defaults):
    """The format of a PDF file, or of a folder of them."""

    about: ClassVar[str] = (
        "PDF files with a text layer: pages, words with boxes, questions about what they say"
    )
    schema: ClassVar[str] = """\
A PDF file, or a folder of them (*.pdf, in subfolders too). Each page becomes a record:

    id        PATH-PAGE: a/report.pdf gives a/report-0001, a/report-0002, ...
    image     the page, drawn at --dpi
    words     of the text layer, in reading order, with their boxes
    turns     questions of --questions about the page, with their answers: cells of its tables,
              "key: value" lines, sections, captions, entries of contents, counts, yes and no, how
              lines go on; in the page's language (English, German, French, Spanish, Russian,
              Chinese), else in English

A scan has no text layer. Its words come from OCR beside it, or in --ocr, for all of its pages
(report.hocr, .xml of ALTO or PAGE, .json of pixparse) or for each (report-0001.xml). Else give it a
text layer (`ocrmypdf IN.pdf OUT.pdf`), or questions about images of its pages (--format=jsonl)."""
    suffixes: ClassVar[tuple[str, ...]] = (".pdf",)
    first_key: ClassVar[str] = ""

    dpi: int = option(pdf_lib.DPI, "pixels an inch at which pages are drawn")
    holdout_by: str = option("document", "what is held out together: document (a file), or page")
    questions: str = option(",".join(KINDS), f"kinds of questions, of {', '.join(KINDS)}; or none")
    indent: bool = option(False, "keep the indentation of code, as spaces of the first word")
    ocr: str = option("", f"for pages without text, {beside.FOLDER_HELP}")
    min_confidence: float = option(0.0, beside.CONFIDENCE_HELP)

    def __post_init__(self):
        beside.check_flags(self.ocr, self.min_confidence)
        for kind in self.kinds:
            if kind not in KINDS:
                raise UsageError(f"--questions={self.questions}: {kind}{nearest(kind, KINDS)}")
        check_dpi(self.dpi)
        if self.holdout_by not in HOLDOUTS:
            raise UsageError(f"--holdout_by={self.holdout_by}{nearest(self.holdout_by, HOLDOUTS)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of questions that are asked."""
        return () if self.questions == "none" else names_of(self.questions, "--questions")

    def units(self, source: str) -> list[Unit]:
        """Returns ranges of pages of all files; see `Format.units`.

        Large files are cut, so that several workers can read one.

        Raises:
          UserError: the source is not there.
        """
        paths = filesystem.list_files(source, self.suffixes)
        units = []
        names = set()
        for path in paths:
            inside = files.inside(source, path)
            name = posixpath.splitext(inside)[0]
            # 1.PDF and 1.pdf are two documents.
            name = inside if name in names else name
            names.add(name)
            # -1, the file's end, also serves for a file that cannot be read: `raws` rejects it.
            stops = [-1]
            if filesystem.size(path) > WHOLE_BYTES:
                num_pages = _num_pages(path)
                stops = [*range(PAGES_PER_UNIT, num_pages, PAGES_PER_UNIT), num_pages or -1]
            units += [
                Unit(path, start, stop, name) for start, stop in itertools.pairwise([0, *stops])
            ]
        return units

    def also_read(self, source: str) -> list[str]:
        """Returns the files of OCR; see `Format.also_read`."""
        return beside.files_of(self.ocr, source)

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the pages of a range, without drawing them; see `Format.raws`."""
        try:
            stop = sandboxed.call(count_pages, unit.path) if unit.stop < 0 else unit.stop
        except Reject as err:
            yield Rejection(unit.name, str(err))
            return
        for page in range(unit.start, stop):
            name = f"{unit.name}-{page + 1:04d}"
            document = name if self.holdout_by == "page" else unit.name
            yield Raw(name, document, {"path": unit.path, "page": page}, f"page {page + 1}")

    def record(self, raw: Raw) -> Record:
        """Returns the record of a page: draws it, and reads its words and tables.

        Raises:
          Reject: the page cannot be read or drawn, takes too much time or memory, shows something
            but has no words, or too few of its words have Unicode, and no OCR has them.
        """
        return sandboxed.call(record_of, self, raw)


def record_of(form: Pdf, raw: Raw) -> Record:
    """Returns the record of a page, as `Pdf.record`, in the process that calls it."""
    with LOCK, _open_page(raw.fields["path"], raw.fields["page"]) as page:
        drawn = pdf_lib.draw(page, form.dpi)
        # Under the lock, too: the objects of a page are pdfium's.
        read = reading.read(page, drawn)
        num_pages = len(_open(raw.fields["path"]))
    if problem := _lack_of_text(read.num_words, len(read.unreadable), drawn):
        place = Place(raw.fields["path"], raw.id.rpartition("-")[0], raw.fields["page"], num_pages)
        found = beside.lines_of(place, form.ocr, *drawn.image.size, form.min_confidence)
        if found is None:
            raise Reject(problem)
        return Record(raw.id, "pdf", (pdf_lib.encode(drawn.image),), (), (found,))
    lines = read.lines()
    turns = _turns(form, raw, read, lines)
    page_lines = reading.plain(indented(lines) if form.indent else lines)
    return Record(raw.id, "pdf", (pdf_lib.encode(drawn.image),), turns, (page_lines,))


def _lack_of_text(num_words: int, num_unreadable: int, drawn: Drawn) -> str:
    """Returns why the words of a page, among them unreadable ones, cannot be what it says; "" where
    they can."""
    # A transcription with many gaps would teach the model to skip what it sees.
    if num_unreadable > MAX_UNREADABLE * num_words:
        return f"words without Unicode ({num_unreadable:,} of {num_words:,})"
    # A page of one colour is blank, which is no fault of the text layer.
    return NO_TEXT if not num_words and pdf_lib.is_marked(drawn.image) else ""


def count_pages(path: str) -> int:
    """Returns the number of pages of a file; raises Reject if it cannot be read, or has fewer than
    it says."""
    with LOCK:
        document = _open(path)
        count = len(document)
        # A file of a kilobyte may say that it has a million, each of which would be tried.
        if count > MANY_PAGES and not _has_page(document, count - 1):
            raise Reject(f"the file says that it has {count:,} pages, and the last is not there")
        return count


def _has_page(document: pypdfium2.PdfDocument, page: int) -> bool:
    try:
        document[page].close()
    except pypdfium2.PdfiumError:
        return False
    return True


@functools.lru_cache(maxsize=2)
def _open(path: str) -> pypdfium2.PdfDocument:
    """Returns an open file, which is cached for its other pages; raises Reject if unreadable,
    and TryAgainError where a bucket does not answer."""
    try:
        if filesystem.is_remote(path):
            return pdf_lib.open_document(filesystem.read(path, MAX_REMOTE_BYTES))
        return pdf_lib.open_document(path)
    except UnreadablePdf as err:
        raise Reject(str(err)) from err
    except (OSError, ValueError) as err:
        filesystem.raise_if_passing(path, err)
        raise Reject(f"a file that cannot be read ({err})") from err


@contextlib.contextmanager
def _open_page(path: str, page: int) -> Iterator[pypdfium2.PdfPage]:
    """A context with a page of a file; what cannot be read or drawn is a Reject."""
    try:
        with pdf_lib.open_page(_open(path), page) as opened:
            yield opened
    except UnreadablePdf as err:
        raise Reject(str(err)) from err


def _num_pages(path: str) -> int:
    """Returns the number of pages of a file; 0 if it cannot be read (`raws` says why)."""
    try:
        return sandboxed.call(count_pages, path)
    except Reject:
        return 0


def _turns(form: Pdf, raw: Raw, read: ReadPage, lines: list[Line]) -> tuple[Turn, ...]:
    """Returns the questions about a page."""
    # Each cell is read once, for all kinds of questions.
    tables = [
        (cells, is_whole(table, read.words, len(read.gray)))
        for table in read.tables
        if (cells := read_cells(read.words, read.unreadable, table, read.gray))
    ]
    texts = []
    for line in lines:
        box = union([placed.word.box for placed in line])
        is_tabular = any(find_cell(line[0].word.box, table) for table in read.tables)
        # A word that the PDF does not spell is missing in its line.
        is_readable = not any(is_on_baseline_of(box, other, 1) for other in read.unreadable)
        texts.append(read_text(line, is_tabular, is_readable))
    page = read_page(texts, len(read.gray), raw.fields["page"])
    # A page's id holds its document and its number: whoever reads it asks the same.
    return make_turns(page, tables, form.kinds, raw.id)
