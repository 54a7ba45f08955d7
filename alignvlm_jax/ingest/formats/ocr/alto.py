"""ALTO, versions 2 to 4: lines of strings, each with its place in the unit of the file."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from alignvlm_jax.data.record import Word
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.ocr import page as page_lib
from alignvlm_jax.ingest.formats.ocr.page import OcrPage

UNITS = ("pixel", "mm10", "inch1200")
"""All are scaled alike, by the size of the page, which is in the same unit."""
AREAS = ("TopMargin", "LeftMargin", "PrintSpace", "RightMargin", "BottomMargin")
"""The areas of a page as they are read; in the file all margins come first."""
HYPHENS = ("-", "‐", "⸗", "¬")


def read_pages(root: Element) -> tuple[OcrPage, ...]:
    """Returns the pages of an ALTO file; raises Reject if it has none."""
    unit = root.findtext("Description/MeasurementUnit", "pixel").strip()
    if unit not in UNITS:
        raise Reject(f"ALTO in an unknown unit ({unit[:20]!r}; known: {', '.join(UNITS)})")
    pages = root.findall("Layout/Page")
    if not pages:
        raise Reject("ALTO without a page")
    return tuple(OcrPage(_size(page), page_lib.without_empty(_lines(page))) for page in pages)


def _size(page: Element) -> tuple[float, float] | None:
    """Returns the width and height of a page, None if it does not say."""
    if page.get("WIDTH") is None or page.get("HEIGHT") is None:
        return None
    box = page_lib.box_of(0, 0, page.get("WIDTH"), page.get("HEIGHT"), "a page")
    return box[2], box[3]


def _lines(page: Element) -> Iterator[list[Word]]:
    """Yields the lines of a page in reading order."""
    areas = [area for area in page if area.tag in AREAS]
    for area in sorted(areas, key=lambda area: AREAS.index(area.tag)):
        for line in area.iter("TextLine"):
            yield _words(line)


def _words(line: Element) -> list[Word]:
    """Returns the words of a line as the page shows them: of a word that goes on in the next line
    its first part, with the hyphen. What both parts spell together (SUBS_CONTENT) is seen
    nowhere."""
    words: list[Word] = []
    for item in line:
        if item.tag == "String" and item.get("CONTENT", "").strip():
            text = page_lib.clean(item.get("CONTENT", ""))
            confidence = page_lib.confidence_of(item.get("WC"))
            words.append(Word(text, _box(item, text), None, confidence))
        elif item.tag == "HYP" and words and not words[-1].text.endswith(HYPHENS):
            words[-1] = _hyphenated(words[-1], item)
    return words


def _hyphenated(word: Word, hyphen: Element) -> Word:
    """Returns a word with the hyphen at its end, whose place the file may leave out."""
    left, top, right, bottom = word.box
    if hyphen.get("HPOS") is not None and hyphen.get("WIDTH") is not None:
        # A hyphen has no height in all versions: it stands within the height of its word.
        start = _number(hyphen, "HPOS")
        left = min(left, start)
        right = max(right, start + _number(hyphen, "WIDTH"))
    shown = page_lib.clean(hyphen.get("CONTENT", "")) or "-"
    return Word(word.text + shown, (left, top, right, bottom), None, word.confidence)


def _box(item: Element, text: str) -> tuple[float, float, float, float]:
    left = _number(item, "HPOS")
    top = _number(item, "VPOS")
    return page_lib.box_of(
        left, top, left + _number(item, "WIDTH"), top + _number(item, "HEIGHT"), text
    )


def _number(item: Element, name: str) -> float:
    """Returns the number that an attribute holds; raises Reject if there is none."""
    try:
        return float(item.get(name, ""))
    except ValueError as err:
        raise Reject(
            f"ALTO in which {item.get('CONTENT', item.tag)[:20]!r} has no {name} "
            f"({item.get(name, '')[:20]!r})"
        ) from err
