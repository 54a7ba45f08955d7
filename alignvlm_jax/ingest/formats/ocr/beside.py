"""The OCR that lies beside a page's file, or in a folder of its own under the same name."""

import functools
import os
import posixpath
from typing import NamedTuple

from alignvlm_jax.data import filesystem
from alignvlm_jax.errors import TryAgainError, UsageError, UserError
from alignvlm_jax.ingest.formats import ocr
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.ocr import page as page_lib
from alignvlm_jax.ingest.formats.ocr.page import Lines, OcrPage
from alignvlm_jax.storage import faults

MAX_BYTES = 64 << 20
"""Largest file of OCR: a page of small print has a quarter of a megabyte."""
FOLDER_HELP = (
    "folder of OCR (hOCR, ALTO, PAGE, pixparse's JSON) named as the pages' files are; default: "
    "beside them"
)
CONFIDENCE_HELP = (
    "words of which OCR is less sure are left out, from 0 to 1; a page with many of them is "
    "rejected"
)


def check_flags(folder: str, min_confidence: float) -> None:
    """Raises UsageError where --min_confidence is none, and UserError where there is no OCR in
    --ocr."""
    if not 0 <= min_confidence <= 1:
        raise UsageError(f"--min_confidence={min_confidence:g} is not from 0 to 1")
    if folder:
        filesystem.list_files(folder, ocr.ENDINGS)


def files_of(folder: str, source: str) -> list[str]:
    """Returns the files of OCR in a folder, or without one beside the pages' files of a source."""
    stem, ending = posixpath.splitext(source)
    # Of a single file those that are named as it is.
    is_file = not folder and ending and not filesystem.is_remote(source) and os.path.isfile(source)
    place = folder or (filesystem.parent(source) or "." if is_file else source)
    try:
        found = filesystem.list_files(place, ocr.ENDINGS)
    except TryAgainError:
        raise
    except UserError:
        return []  # nothing but pages, none of which needs any
    return [path for path in found if not is_file or path.startswith(stem)]


class Place(NamedTuple):
    """A page within its document."""

    path: str  # of the document's file
    name: str  # of the document within the source, without its ending
    page: int  # from 0
    num_pages: int  # of the document


def lines_of(
    place: Place, folder: str, width: int, height: int, min_confidence: float
) -> Lines | None:
    """Returns the words of a page, by lines, as the OCR beside it has them; None if there is none.

    One file has all pages of a document, or each page has its own: DOCUMENT-0001 and so on.

    Args:
      place: the page.
      folder: of the OCR; "" for that of the document.
      width: of the page's image in pixels.
      height: of the page's image in pixels.
      min_confidence: as of `page.fit`.

    Raises:
      Reject: the OCR cannot be read, is of another number of pages, does not fit the image, has no
        words, or several files could be meant.
      UserError: a bucket does not answer.
    """
    stem, ending = posixpath.splitext(place.path)
    base = filesystem.join(folder, place.name) if folder else stem
    whole = _existing([base, base + ending])
    own = _existing([f"{base}-{place.page + 1:04d}"]) if place.num_pages > 1 and not whole else []
    found = whole + own
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(filesystem.name(path) for path in found)
        raise Reject(f"several files of OCR ({names}); leave one of them")
    [path] = found
    pages = _read(path, tuple(filesystem.entry(path)))
    if isinstance(pages, str):
        raise Reject(f"{pages}; {filesystem.name(path)}")
    expected = place.num_pages if whole else 1
    if len(pages) != expected:
        raise Reject(
            f"OCR of another number of pages ({filesystem.name(path)} has {len(pages):,}, and the "
            f"document {expected:,})"
        )
    lines = page_lib.fit(pages[place.page if whole else 0], width, height, min_confidence)
    if not lines:
        raise Reject(f"OCR without a word ({filesystem.name(path)})")
    return lines


def _existing(bases: list[str]) -> list[str]:
    """Returns the files of OCR that are there, of those whose names begin with one of `bases`."""
    return [base + ending for base in bases for ending in ocr.ENDINGS if _is_file(base + ending)]


def _is_file(path: str) -> bool:
    if filesystem.is_remote(path):
        return filesystem.name(path) in filesystem.listing(filesystem.parent(path))
    # Of a folder of millions of pages no listing: this asks for one name.
    return os.path.isfile(path)


@functools.lru_cache(maxsize=2)
def _read(path: str, version: tuple) -> tuple[OcrPage, ...] | str:
    """Returns the pages of a file, cached in this version for the other pages of its document; or
    why it cannot be read, which is then found once."""
    try:
        return ocr.read_pages(filesystem.read(path, MAX_BYTES), filesystem.name(path))
    except Reject as err:
        return str(err)
    except (OSError, ValueError) as err:
        if filesystem.is_remote(path) and isinstance(err, OSError):
            raise faults.as_error(
                f"cannot read {path}: {err}; the same command goes on", err
            ) from err
        return f"a file of OCR that cannot be read ({err})"
