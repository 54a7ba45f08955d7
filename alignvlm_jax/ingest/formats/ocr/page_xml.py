"""PAGE, versions of 2013 to 2019: regions of lines of words, with outlines in pixels and the order
in which the regions are read."""

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from alignvlm_jax.data.record import Box, Word
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.ocr import page as page_lib
from alignvlm_jax.ingest.formats.ocr import safe_xml
from alignvlm_jax.ingest.formats.ocr.page import OcrPage


def read_pages(root: Element) -> tuple[OcrPage, ...]:
    """Returns the page of a PAGE file, which has one; raises Reject if it has none."""
    page = root.find("Page")
    if page is None:
        raise Reject("PAGE without a page")
    size = page_lib.box_of(0, 0, page.get("imageWidth"), page.get("imageHeight"), "a page")
    lines = [_words(line) for region in _ordered(page) for line in _lines(region)]
    return (OcrPage((size[2], size[3]), page_lib.without_empty(lines)),)


def _ordered(page: Element) -> list[Element]:
    """Returns the text regions of a page in reading order; those that it does not name come last,
    in the order of the file."""
    order = page.find("ReadingOrder")
    named = [] if order is None else [ref for group in order for ref in _references(group)]
    # Of a region that is named twice, the first counts.
    places = {name: place for place, name in reversed(list(enumerate(named)))}
    found: list[tuple[int, Element]] = []

    def collect(parent: Element, place: int) -> None:
        for child in parent:
            if child.tag == "ReadingOrder" or child.tag == "TextLine":
                continue
            # A region within one that is named is read with it.
            own = places.get(child.get("id", ""), place)
            if child.tag == "TextRegion":
                found.append((own, child))
            collect(child, own)

    collect(page, len(named))
    return [region for _, region in sorted(found, key=lambda one: one[0])]


def _references(group: Element) -> Iterator[str]:
    """Yields the regions that a group of the reading order names, groups within it too."""
    if "regionRef" in group.attrib:
        yield group.attrib["regionRef"]
    children = list(group)
    if group.tag.startswith("Ordered"):
        children.sort(key=_index)
    for child in children:
        yield from _references(child)


def _index(reference: Element) -> int:
    """Returns the place of a reference in its group; raises Reject if it is no number."""
    try:
        return int(reference.get("index", "0"))
    except ValueError as err:
        raise Reject(f"PAGE with an order that is none ({reference.get('index')!r:.40})") from err


def _lines(region: Element) -> list[Element]:
    """Returns the lines of a text region, without those of regions within it.

    Raises:
      Reject: it has text and no line, so that nothing says where the text stands.
    """
    lines = list(safe_xml.within(region, "TextLine"))
    if not lines and region.find("TextRegion") is None and (text := _text(region)[0]):
        raise Reject(f"PAGE in which the text of a region has no lines ({text[:20]!r})")
    return lines


def _words(line: Element) -> tuple[Word, ...]:
    """Returns the words of a line; where they have no text of their own, those of its text."""
    text, confidence = _text(line)
    words = [(*_text(word), word) for word in safe_xml.within(line, "Word")]
    if words and all(spelled for spelled, *_ in words):
        return tuple(
            Word(spelled, _box(word, spelled), None, sure) for spelled, sure, word in words
        )
    return page_lib.spread(text, _box(line, text), confidence) if text else ()


def _text(element: Element) -> tuple[str, float | None]:
    """Returns the text of an element, and how sure it is; of several readings the first by their
    index."""
    readings = sorted(safe_xml.within(element, "TextEquiv"), key=_index)
    if not readings:
        return "", None
    text = readings[0].findtext("Unicode") or ""
    return page_lib.clean(text), page_lib.confidence_of(readings[0].get("conf"))


def _box(element: Element, text: str) -> Box:
    """Returns the box around the outline of an element."""
    outline = element.find("Coords")
    points = [] if outline is None else outline.get("points", "").split()
    corners = [point.split(",") for point in points]
    if not corners or any(len(corner) != 2 for corner in corners):
        raise Reject(f"PAGE in which {text[:20]!r} has no outline ({' '.join(points)[:40]!r})")
    try:
        xs, ys = ([float(side) for side in sides] for sides in zip(*corners, strict=True))
    except ValueError as err:
        raise Reject(f"PAGE in which {text[:20]!r} has no outline ({err})") from err
    return page_lib.box_of(min(xs), min(ys), max(xs), max(ys), text)
