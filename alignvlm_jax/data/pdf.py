"""PDF files: opens one and its pages, draws a page to an image, and lists the objects on it.

Training and questions draw by the same functions: a model is asked about pages that look like those
it was trained on. pdfium is not thread-safe: whatever touches a document holds `LOCK`.

Coordinates: a PDF page has its origin at the bottom left and y upwards, in points of 1/72 inch; an
image has its origin at the top left and y downwards, in pixels. Matrices are float64 [2, 3] and map
(x, y, 1) to (x, y).
"""

import contextlib
import ctypes
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pypdfium2
from PIL import Image, UnidentifiedImageError
from pypdfium2 import raw as pdfium

from alignvlm_jax.data.sandbox import CallEnded, Sandbox
from alignvlm_jax.errors import UserError

LOCK = threading.RLock()
"""Held by all that touches a document: pdfium is not thread-safe."""
POINTS_PER_INCH = 72
DPI = 100
"""Pixels an inch at which pages are drawn where nothing else is said: by `prepare`, and for a model
of which nobody knows how it saw others."""
HEADER = b"%PDF"
MAX_JUNK = 1024
"""Bytes that may stand before the header, as for other readers: a line feed, or what a web server
wrote."""
MAX_PIXELS = 1 << 26
"""Largest number of pixels of a drawn page: A4 has 35 million at 600 dpi."""
MAX_IMAGE_BYTES = 1 << 28
"""Most bytes that an image on a page may be decoded to: a scan of A4 at 600 dpi has 4 million where
a pixel is black or white, and 104 million in colours."""
MAX_DEPTH = 8
"""Depth to which forms within forms are read (a form is a piece of content used as one object)."""
JPEG_QUALITY = 90
"""JPEG quality at which small text stays legible; Pillow's default, 75, blurs it."""
MAX_CHANGES = 0.3
"""Largest fraction of pixels unlike their left neighbours in pages that are surely smaller as a
PNG: of text they are less than a quarter, of a photo nearly all."""
PNG_LEVEL = 3
"""zlib's level; 6, the default, takes twice the time for 5 % fewer bytes."""

_sandbox = Sandbox()
"""The process in which this one draws the pages that a model is asked about."""


class UnreadablePdf(UserError):
    """A PDF file or page that cannot be read or drawn; the message says what it is instead."""


class UnreadablePage(UserError):
    """A page of a file that cannot be drawn, or is not there; the message names the file."""


class Drawn(NamedTuple):
    """A page as it is displayed: rotated, and cut to its crop box."""

    image: Image.Image  # RGB, or L where it is gray
    to_pixels: np.ndarray  # float64 [2, 3], from the page's own coordinates
    scale: float  # pixels a point


def is_pdf(data: bytes) -> bool:
    """Whether the content of a file is that of a PDF."""
    if HEADER not in data[: MAX_JUNK + len(HEADER)]:
        return False
    if data.startswith(HEADER):
        return True
    # A comment of an image may hold the same letters.
    try:
        with Image.open(io.BytesIO(data)):
            return False
    except UnidentifiedImageError:
        return True
    except Exception:  # A damaged image: decoders raise anything.
        return False


def open_document(source: str | bytes) -> pypdfium2.PdfDocument:
    """Returns an open PDF.

    Args:
      source: the content of the file; or its path, of which pdfium reads no more than it needs.

    Raises:
      UnreadablePdf: it is none, damaged, or needs a password.
    """
    try:
        document = pypdfium2.PdfDocument(source)
        # Before any page: fields that have a value and no appearance are drawn by what this makes.
        document.init_forms()
        return document
    except pypdfium2.PdfiumError as err:
        if err.err_code == pdfium.FPDF_ERR_PASSWORD:
            raise UnreadablePdf("a PDF that a password protects") from err
        raise UnreadablePdf(f"no PDF, or a damaged one ({err})") from err


@contextlib.contextmanager
def open_page(document: pypdfium2.PdfDocument, index: int) -> Iterator[pypdfium2.PdfPage]:
    """A context manager that yields page `index`, counted from 0, and closes it at the end.

    What annotations and filled-in forms show is made part of the page's content first, so that its
    text is found.

    Raises:
      UnreadablePdf: the page cannot be read.
    """
    try:
        page = document[index]
        # Links have no text, and most pages have no other annotation.
        if any(not _is_link(page, i) for i in range(pdfium.FPDFPage_GetAnnotCount(page))):
            pdfium.FPDFPage_Flatten(page, pdfium.FLAT_NORMALDISPLAY)
            # An open page keeps the objects that it was parsed to: only a new one has the
            # flattened annotations.
            page.close()
            page = document[index]
    except (pypdfium2.PdfiumError, IndexError) as err:
        raise UnreadablePdf(f"a page that cannot be read ({err})") from err
    try:
        yield page
    finally:
        page.close()


def draw(page: pypdfium2.PdfPage, dpi: float) -> Drawn:
    """Returns a page drawn at `dpi` pixels an inch.

    Raises:
      UnreadablePdf: the page, or an image on it, is too large; nothing is drawn then.
    """
    width, height = (side * dpi / POINTS_PER_INCH for side in page.get_size())
    if not 0 < width * height <= MAX_PIXELS:
        raise UnreadablePdf(
            f"a page is too large ({width:.0f} x {height:.0f} pixels at {dpi} dpi; at most "
            f"{MAX_PIXELS:,})"
        )
    # pdfium decodes an image whole, even one that the page shows as a stamp, and a few compressed
    # bytes can claim gigabytes.
    for drawn, kind, _ in objects(page, np.eye(2, 3)):
        if kind == pdfium.FPDF_PAGEOBJ_IMAGE:
            _check_image(page, drawn)
    bitmap = page.render(scale=dpi / POINTS_PER_INCH, may_draw_forms=False, draw_annots=False)
    pixels = bitmap.to_numpy()
    # Gray pages are kept with one channel, which makes smaller files.
    is_gray = all(np.array_equal(pixels[..., 0], pixels[..., i]) for i in (1, 2))
    image = Image.fromarray(pixels[..., 0]) if is_gray else bitmap.to_pil()
    return Drawn(image, _to_pixels(page, image.size), dpi / POINTS_PER_INCH)


def draw_of_file(
    data: bytes, name: str, page: int | None, dpi: float, sandbox: Sandbox = _sandbox
) -> Image.Image:
    """Returns a page of a PDF file drawn as RGB, in a process beside this one: some pages take for
    ever.

    Args:
      data: the content of the file.
      name: what it is called in messages.
      page: number of the page, from 1; None for the only one.
      dpi: pixels an inch.
      sandbox: the process; one draws a page at a time.

    Raises:
      UnreadablePage: the file cannot be read, has several pages and none is named, has no such
        page, or the page cannot be drawn within the limits of time and memory.
      UserError: the process cannot be started, which is no fault of the page.
    """
    try:
        return sandbox.call(_draw_of_file, data, name, page, dpi)
    except (UnreadablePdf, CallEnded) as err:
        raise UnreadablePage(f"cannot read {name}, page {page or 1}: {err}") from err


def count_pages_of_file(data: bytes, name: str, sandbox: Sandbox = _sandbox) -> int:
    """Returns the number of pages of a PDF file; raises as `draw_of_file`."""
    try:
        return sandbox.call(_count_pages, data)
    except (UnreadablePdf, CallEnded) as err:
        raise UnreadablePage(f"cannot read {name}: {err}") from err


def _count_pages(data: bytes) -> int:
    with LOCK, contextlib.closing(open_document(data)) as document:
        return len(document)


def _draw_of_file(data: bytes, name: str, page: int | None, dpi: float) -> Image.Image:
    """Returns what `draw_of_file` does, in the process that calls it; raises UnreadablePdf for what
    cannot be read or drawn, and UnreadablePage for a page that is not there or not named."""
    with LOCK, contextlib.closing(open_document(data)) as document:
        if page is None and len(document) > 1:
            raise UnreadablePage(f"{name} has {len(document)} pages; name one, as {name}#page=1")
        page = 1 if page is None else page
        if not 1 <= page <= len(document):
            raise UnreadablePage(f"{name} has no page {page}: its pages are 1 to {len(document)}")
        with open_page(document, page - 1) as opened:
            return draw(opened, dpi).image.convert("RGB")


def is_marked(image: Image.Image) -> bool:
    """Whether a page shows anything: it is not of one colour throughout."""
    extrema = image.getextrema()
    bands = [extrema] if len(image.getbands()) == 1 else extrema
    return any(low != high for low, high in bands)


def encode(image: Image.Image) -> bytes:
    """Returns an image as a PNG file, or as a JPEG if that is less than half as large.

    Scans and photos become JPEG; text, rules and flat colours take no more space without loss.
    """
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    # Every eighth row tells what kind of page it is.
    rows = pixels[::8]
    changes = (rows[:, 1:] != rows[:, :-1]).any(2)
    is_flat = not changes.size or changes.mean() <= MAX_CHANGES
    if is_flat and image.mode in ("L", "RGB"):
        return _plain_png(pixels)
    png = io.BytesIO()
    jpeg = io.BytesIO()
    image.save(png, "PNG")
    # Without chroma subsampling, which smears coloured text.
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return (jpeg if 2 * jpeg.tell() < png.tell() else png).getvalue()


def _plain_png(pixels: np.ndarray) -> bytes:
    """Returns a PNG file, with unfiltered rows, of gray or RGB pixels: uint8 [Y, X, 1 or 3].

    Pillow tries each of PNG's filters on each row, which help photos alone: pages of text take
    three times as long then, and as many bytes.
    """
    # Each row is one byte, its filter (0 for none), and its pixels.
    height, width, channels = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))
    colours = 2 if channels == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    compressed = zlib.compress(rows, PNG_LEVEL)
    parts = ((b"IHDR", header), (b"IDAT", compressed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", _crc(kind, content))
        for kind, content in parts
    )


def _crc(kind: bytes, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(kind))


def objects(
    page: pypdfium2.PdfPage, matrix: np.ndarray
) -> Iterator[tuple[object, int, np.ndarray]]:
    """Yields the objects on a page, also those within forms, as (object, type, matrix).

    Args:
      page: the page.
      matrix: float64 [2, 3], from the page's coordinates to those that the caller wants. The
        yielded matrix maps the object's own coordinates there.
    """
    count = pdfium.FPDFPage_CountObjects(page)
    waiting = [(pdfium.FPDFPage_GetObject(page, i), matrix, 0) for i in reversed(range(count))]
    # A stack, not recursion; reversed, so that the page's own objects come in its order.
    while waiting:
        drawn, outer, depth = waiting.pop()
        own = pdfium.FS_MATRIX()
        kind = pdfium.FPDFPageObj_GetType(drawn)
        pdfium.FPDFPageObj_GetMatrix(drawn, own)
        # [2, 3] @ [3, 3]: the object's matrix has (0, 0, 1) as its last row.
        inner = outer @ np.array([[own.a, own.c, own.e], [own.b, own.d, own.f], [0, 0, 1]])
        yield drawn, kind, inner
        if kind == pdfium.FPDF_PAGEOBJ_FORM and depth < MAX_DEPTH:
            count = pdfium.FPDFFormObj_CountObjects(drawn)
            waiting += [
                (pdfium.FPDFFormObj_GetObject(drawn, i), inner, depth + 1) for i in range(count)
            ]


def _check_image(page: pypdfium2.PdfPage, drawn: object) -> None:
    """Raises UnreadablePdf if an image on a page has too many bytes to be decoded."""
    columns = ctypes.c_uint()
    rows = ctypes.c_uint()
    pdfium.FPDFImageObj_GetImagePixelSize(drawn, columns, rows)
    about = pdfium.FPDF_IMAGEOBJ_METADATA()
    pdfium.FPDFImageObj_GetImageMetadata(drawn, page, about)
    # A damaged image has 0 bits a pixel: it may be of any kind.
    bits = about.bits_per_pixel or 32
    if columns.value * rows.value * bits > 8 * MAX_IMAGE_BYTES:
        raise UnreadablePdf(
            f"an image on a page is too large ({columns.value} x {rows.value} pixels of {bits} "
            f"bits; at most {MAX_IMAGE_BYTES >> 20} MiB)"
        )


def _is_link(page: pypdfium2.PdfPage, index: int) -> bool:
    """Whether annotation `index` of a page is a link."""
    annotation = pdfium.FPDFPage_GetAnnot(page, index)
    try:
        return pdfium.FPDFAnnot_GetSubtype(annotation) == pdfium.FPDF_ANNOT_LINK
    finally:
        pdfium.FPDFPage_CloseAnnot(annotation)


def _to_pixels(page: pypdfium2.PdfPage, size: tuple[int, int]) -> np.ndarray:
    """Returns the matrix, float64 [2, 3], from a page's coordinates to pixels of its image.

    The page's coordinates are those before it is rotated for display, and its box need not start at
    the origin.

    Args:
      page: the page.
      size: width and height of the image in pixels.
    """
    left, bottom, right, top = page.get_bbox()
    # By clockwise rotation in degrees: from the page's coordinates to points from the top left of
    # the displayed page.
    displayed = {
        0: [[1, 0, -left], [0, -1, top]],
        90: [[0, 1, -bottom], [1, 0, -left]],
        180: [[-1, 0, right], [0, 1, -bottom]],
        270: [[0, -1, top], [-1, 0, right]],
    }[page.get_rotation()]
    width, height = page.get_size()
    # Not one scale for both axes: the image's sides are rounded to whole pixels.
    return np.array(displayed) * [[size[0] / width], [size[1] / height]]
