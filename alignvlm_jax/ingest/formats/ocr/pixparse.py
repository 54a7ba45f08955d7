"""The JSON of pixparse's document sets: words by pages, with boxes as fractions of the page."""

import itertools
from collections.abc import Mapping
from typing import Any

from alignvlm_jax.data.record import Word
from alignvlm_jax.ingest.formats import files
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
    return tuple(map(_page, pages))


def _page(fields: Any) -> OcrPage:
    """Returns a page, of which each word says its line."""
    words = fields.get("words") if isinstance(fields, dict) else None
    if not isinstance(words, dict):
        raise Reject("JSON that is no OCR of pixparse: a page has no `words`")
    texts = _column(words, "text", str)
    boxes = _column(words, "bbox", list)
    places = _column(words, "line_pos", list)
    scores = words.get("score") or [None] * len(texts)
    try:
        rows = list(zip(texts, boxes, places, scores, strict=True))
        placed = [(place[0], _word(text, box, score)) for text, box, place, score in rows]
    except (IndexError, TypeError, ValueError) as err:
        counts = ", ".join(str(len(column)) for column in (texts, boxes, places))
        raise Reject(f"pixparse's words, boxes and lines do not fit ({counts}; {err})") from err
    # Words follow each other as they are read: a line is a run of those that name it.
    runs = itertools.groupby(placed, key=lambda one: one[0])
    lines = [[word for _, word in run] for _, run in runs]
    return OcrPage(page_lib.FRACTIONS, page_lib.without_empty(lines))


def _word(text: str, box: list, score: Any) -> Word:
    """Returns a word, whose box is its left, top, width and height."""
    left, top, width, height = box
    text = page_lib.clean(text)
    sides = page_lib.box_of(left, top, left + width, top + height, text)
    return Word(text, sides, None, page_lib.confidence_of(score))


def _column(words: Mapping[str, Any], name: str, kind: type) -> list:
    """Returns a value of each word; raises Reject if there are none of this kind."""
    values = words.get(name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise Reject(f"pixparse's words have no list of `{name}`")
    return values
