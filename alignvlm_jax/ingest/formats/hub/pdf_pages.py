"""Pages of PDFs, and of image files of several, that a row or a member of a tar file holds.

They are read in a process that may be ended.

`formats/pdf` reads files by their paths; here the content of a file is given.
"""

import contextlib
import functools
import io
from collections.abc import Iterator

import pypdfium2
from PIL import Image

from alignvlm_jax.data import images
from alignvlm_jax.data import pdf as pdf_lib
from alignvlm_jax.data.pdf import LOCK, UnreadablePdf
from alignvlm_jax.data.record import Word
from alignvlm_jax.errors import one_line
from alignvlm_jax.ingest.formats import checks, sandboxed
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.pdf import document, reading

Lines = tuple[tuple[Word, ...], ...]

MAX_PAGES = 50
"""Most pages of a PDF that is one record: its images are in memory together."""


def count(data: bytes) -> int:
    """Returns the number of pages of a PDF; raises Reject if it cannot be read."""
    return sandboxed.call(count_pages, data)


def image(data: bytes, page: int, dpi: int) -> bytes:
    """Returns page `page` of a PDF, counted from 0, as an image file.

    Raises:
      Reject: it cannot be drawn, or takes too much time or memory.
    """
    return sandboxed.call(draw_page, data, page, dpi)


def all_pages(data: bytes, dpi: int) -> tuple[tuple[bytes, ...], tuple[Lines, ...]]:
    """Returns the pages of a PDF as image files, and the lines of each.

    There are no lines at all where a page shows something whose words the PDF does not know, as a
    scan: a page without its words would be taught to be blank.

    Raises:
      Reject: it cannot be read or drawn, or has more than `MAX_PAGES`.
    """
    num_pages = count(data)
    if num_pages > MAX_PAGES:
        raise Reject(f"a PDF of too many pages for a record ({num_pages}; at most {MAX_PAGES})")
    # A call each: the limits of time and memory are those of a page.
    pages = [sandboxed.call(read_page, data, page, dpi) for page in range(num_pages)]
    drawn = tuple(encoded for encoded, _ in pages)
    lines = tuple(found for _, found in pages if found is not None)
    return drawn, lines if len(lines) == len(drawn) else ()


def frames(data: bytes) -> int:
    """Returns the number of pages of an image file, of which a TIFF may have several; raises Reject
    if it is none."""
    # There, too, where nothing is decoded: the header of a TIFF may be made to take for ever.
    return sandboxed.call(count_frames, data)


def frame(data: bytes, page: int) -> bytes:
    """Returns a page of an image file, counted from 0, as an image file of its own; raises Reject
    if it cannot be read, or takes too much time or memory."""
    return sandboxed.call(read_frame, data, page)


def count_pages(data: bytes) -> int:
    """As `count`, in the process that calls it."""
    with LOCK:
        return len(_open(data))


def draw_page(data: bytes, page: int, dpi: int) -> bytes:
    """As `image`, in the process that calls it."""
    try:
        with LOCK, pdf_lib.open_page(_open(data), page) as opened:
            drawn = pdf_lib.draw(opened, dpi)
    except UnreadablePdf as err:
        raise Reject(str(err)) from err
    return pdf_lib.encode(drawn.image)


def read_page(data: bytes, page: int, dpi: int) -> tuple[bytes, Lines | None]:
    """Returns a page as an image file and its lines, in the process that calls it.

    The lines are None where the page shows something whose words the PDF does not know.
    """
    try:
        with LOCK, pdf_lib.open_page(_open(data), page) as opened:
            drawn = pdf_lib.draw(opened, dpi)
            # Under the lock, too: the objects of a page are pdfium's.
            read = reading.read(opened, drawn)
    except UnreadablePdf as err:
        raise Reject(str(err)) from err
    # By the measure of `formats/pdf`, which rejects such a page; its questions are of use here.
    is_known = bool(read.num_words) or not pdf_lib.is_marked(drawn.image)
    is_known = is_known and len(read.unreadable) <= document.MAX_UNREADABLE * read.num_words
    return pdf_lib.encode(drawn.image), reading.plain(read.lines()) if is_known else None


def count_frames(data: bytes) -> int:
    """As `frames`, in the process that calls it."""
    with _no_bad_image(), Image.open(io.BytesIO(data)) as opened:
        checks.check_header(opened)
        return len(images.page_frames(opened))


def read_frame(data: bytes, page: int) -> bytes:
    """As `frame`, in the process that calls it."""
    with _no_bad_image(), Image.open(io.BytesIO(data)) as opened:
        # Before `seek`, which loads the pixels of some kinds; and the page that it finds.
        checks.check_header(opened)
        opened.seek(images.page_frames(opened)[page])
        checks.check_header(opened)
        return pdf_lib.encode(images.as_rgb(opened))


@contextlib.contextmanager
def _no_bad_image() -> Iterator[None]:
    """A context in which whatever an image library raises is a Reject."""
    try:
        yield
    except Reject:
        raise
    except Exception as err:  # decoders raise anything on damaged files
        raise Reject(f"an image cannot be read ({one_line(err)})") from err


@functools.lru_cache(maxsize=1)
def _open(data: bytes) -> pypdfium2.PdfDocument:
    """Returns an open PDF, which is kept for its other pages; raises Reject if unreadable."""
    try:
        return pdf_lib.open_document(data)
    except UnreadablePdf as err:
        raise Reject(str(err)) from err
