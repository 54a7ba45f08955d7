"""The JSON of pixparse's document sets: words by pages, with boxes as fractions of the page."""

from collections.abc import Mapping
from typing import Any

from alignvlm_jax.ingest.formats import files, pixparse
from alignvlm_jax.ingest.formats.base import Reject, Rejection
from alignvlm_jax.ingest.formats.ocr import page as page_lib
from alignvlm_jax.ingest.formats.ocr.page import OcrPage


def read_pages(content: bytes) -> tuple[OcrPage, ...]:
    """Returns the pages of a JSON file; raises Reject if it is none of pixparse's."""
    parsed = files.parse_json("", content)
    if isinstance(parsed, Rejection):
        raise Reject(f"OCR that is {parsed.reason}")
    return pages_of(parsed[1])


def pages_of(fields: Mapping[str, Any]) -> tuple[OcrPage, ...]:
    """Returns the pages of a JSON object; raises Reject if it is none of pixparse's."""
    pages = fields.get("pages")
    if not isinstance(pages, list) or not pages:
        raise Reject("JSON that is no OCR of pixparse: it has no list of `pages`")
    # Which words are certain enough is said of all kinds of OCR alike, later.
    return tuple(OcrPage(page_lib.FRACTIONS, pixparse.lines_of(page)) for page in pages)
