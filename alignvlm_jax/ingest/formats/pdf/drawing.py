"""A page of a PDF: opened with its annotations, drawn to an image, and the objects on it with their
coordinates."""

import contextlib
import ctypes
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pypdfium2
from PIL import Image
from pypdfium2 import raw as pdfium

from alignvlm_jax.ingest.formats.base import Reject

POINTS_PER_INCH = 72
MAX_PIXELS = 1 << 25
"""Of a drawn page, and of an image on it: an A4 page has 35 million at 600 dpi."""
MAX_DEPTH = 8
"""Of forms (pieces of content that are used as one object) within forms."""
JPEG_QUALITY = 90
"""Small text stays as legible; JPEG's own default, 75, blurs it."""


class Drawn(NamedTuple):
    """A page as it is displayed: rotated, and cut to its crop box."""

    image: Image.Image  # RGB, or L where it is gray
    to_pixels: np.ndarray  # float64 [2, 3], from the page's own coordinates
    scale: float  # pixels a point


@contextlib.contextmanager
def open_page(document: pypdfium2.PdfDocument, index: int) -> Iterator[pypdfium2.PdfPage]:
    """Opens a page, from 0.

    What annotations and filled-in forms show is made part of it, so that its text is found.

    Raises:
      Reject: the page cannot be read.
    """
    try:
        page = document[index]
        if any(not _is_link(page, i) for i in range(pdfium.FPDFPage_GetAnnotCount(page))):
            pdfium.FPDFPage_Flatten(page, pdfium.FLAT_NORMALDISPLAY)
            page.close()
            page = document[index]
    except (pypdfium2.PdfiumError, IndexError) as err:
        raise Reject(f"a page that cannot be read ({err})") from err
    try:
        yield page
    finally:
        page.close()


def draw(page: pypdfium2.PdfPage, dpi: float) -> Drawn:
    """Draws a page.

    Raises:
      Reject: it, or an image on it, is too large; nothing is drawn then.
    """
    width, height = (side * dpi / POINTS_PER_INCH for side in page.get_size())
    if not 0 < width * height <= MAX_PIXELS:
        raise Reject(
            f"a page is too large ({width:.0f} x {height:.0f} pixels at {dpi} dpi; at most "
            f"{MAX_PIXELS:,})"
        )
    for drawn, kind, _ in objects(page, np.eye(2, 3)):
        if kind == pdfium.FPDF_PAGEOBJ_IMAGE:
            columns = ctypes.c_uint()
            rows = ctypes.c_uint()
            pdfium.FPDFImageObj_GetImagePixelSize(drawn, columns, rows)
            if columns.value * rows.value > MAX_PIXELS:
                raise Reject(
                    f"an image on a page is too large ({columns.value} x {rows.value} pixels)"
                )
    image = page.render(
        scale=dpi / POINTS_PER_INCH, may_draw_forms=False, draw_annots=False
    ).to_pil()
    if all(np.array_equal(image.getchannel(0), image.getchannel(i)) for i in (1, 2)):
        image = image.getchannel(0)
    return Drawn(image, _to_pixels(page, image.size), dpi / POINTS_PER_INCH)


def encode(image: Image.Image) -> bytes:
    """Returns a PNG; or a JPEG where that is less than half as large, as for scans and photos. What
    is drawn (text, rules, flat colours) takes no more without loss."""
    png = io.BytesIO()
    jpeg = io.BytesIO()
    image.save(png, "PNG")
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return (jpeg if 2 * jpeg.tell() < png.tell() else png).getvalue()


def objects(
    page: pypdfium2.PdfPage, matrix: np.ndarray
) -> Iterator[tuple[object, int, np.ndarray]]:
    """Yields pdfium's objects on a page, those in forms too, each with its type and the product of
    its matrix with `matrix` [2, 3]."""
    count = pdfium.FPDFPage_CountObjects(page)
    waiting = [(pdfium.FPDFPage_GetObject(page, i), matrix, 0) for i in reversed(range(count))]
    while waiting:
        drawn, outer, depth = waiting.pop()
        own = pdfium.FS_MATRIX()
        kind = pdfium.FPDFPageObj_GetType(drawn)
        pdfium.FPDFPageObj_GetMatrix(drawn, own)
        inner = outer @ np.array([[own.a, own.c, own.e], [own.b, own.d, own.f], [0, 0, 1]])
        yield drawn, kind, inner
        if kind == pdfium.FPDF_PAGEOBJ_FORM and depth < MAX_DEPTH:
            count = pdfium.FPDFFormObj_CountObjects(drawn)
            waiting += [
                (pdfium.FPDFFormObj_GetObject(drawn, i), inner, depth + 1) for i in range(count)
            ]


def _is_link(page: pypdfium2.PdfPage, index: int) -> bool:
    annotation = pdfium.FPDFPage_GetAnnot(page, index)
    try:
        return pdfium.FPDFAnnot_GetSubtype(annotation) == pdfium.FPDF_ANNOT_LINK
    finally:
        pdfium.FPDFPage_CloseAnnot(annotation)


def _to_pixels(page: pypdfium2.PdfPage, size: tuple[int, int]) -> np.ndarray:
    """From the page's coordinates, which start at the bottom left of its box, before it is turned
    for display."""
    left, bottom, right, top = page.get_bbox()
    displayed = {  # in points, from the top left
        0: [[1, 0, -left], [0, -1, top]],
        90: [[0, 1, -bottom], [1, 0, -left]],
        180: [[-1, 0, right], [0, 1, -bottom]],
        270: [[0, -1, top], [-1, 0, right]],
    }[page.get_rotation()]
    width, height = page.get_size()
    return np.array(displayed) * [[size[0] / width], [size[1] / height]]
