"""PAGE, versions of 2013 to 2019: regions of lines of words, with outlines in pixels and the order
in which the regions are read."""

import collections
import operator
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
    """Returns the words of a line, of whose text the line's own is the one that counts: people who
    correct a transcription correct lines, and leave the words as the program read them."""
    text, confidence = _text(line)
    readings = [(*_text(word), word) for word in safe_xml.within(line, "Word")]
    if not text or all(spelled for spelled, *_ in readings):
        words = tuple(
            Word(spelled, _box(word, spelled), None, sure)
            for spelled, sure, word in readings
            if spelled
        )
        if not text:
            return words
        if found := _respelled(text, words, confidence):
            return found
    return page_lib.spread(text, _box(line, text), confidence)


def _respelled(text: str, words: tuple[Word, ...], confidence: float | None) -> tuple[Word, ...]:
    """Returns the words of a line as its text spells them, in its order, in the boxes of `words`;
    none where it does not tell which box is whose.

    Args:
      text: of the line, its words apart by single spaces.
      words: with text each.
      confidence: of the line, for words that are spelt otherwise.
    """
    tokens = text.split()
    spelled = [word.text.replace(" ", "") for word in words]
    # Punctuation may be a word of its own, and a word may have a space.
    if "".join(spelled) == "".join(tokens):
        return tuple(_merged(tokens, words))
    if len(tokens) != len(words):
        return ()
    if sorted(tokens) == sorted(spelled):
        # Stable: of equal words the first in the file is the first of the line.
        by_text = iter(sorted(zip(spelled, range(len(words)), strict=True)))
        places = sorted(range(len(tokens)), key=lambda place: (tokens[place], place))
        found = {place: words[number] for place, (_, number) in zip(places, by_text, strict=True)}
        return tuple(found[place] for place in range(len(tokens)))
    in_place = sum(map(operator.eq, tokens, spelled))
    # What stands in another place was moved: its box cannot be told by counting.
    if (collections.Counter(tokens) & collections.Counter(spelled)).total() > in_place:
        return ()
    return tuple(
        word if token == was else Word(token, word.box, None, confidence)
        for token, was, word in zip(tokens, spelled, words, strict=True)
    )


def _merged(tokens: list[str], words: tuple[Word, ...]) -> Iterator[Word]:
    """Yields words of the same characters as `tokens`, and broken as these are; what is several
    tokens in one box stays one word."""
    rest = list(tokens)
    group: list[Word] = []
    names: list[str] = []
    for word in words:
        group.append(word)
        length = sum(len(one.text.replace(" ", "")) for one in group)
        while rest and sum(map(len, names)) < length:
            names.append(rest.pop(0))
        if sum(map(len, names)) == length:
            sides = list(zip(*(one.box for one in group), strict=True))
            box = (min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3]))
            sure = [one.confidence for one in group if one.confidence is not None]
            yield Word(" ".join(names), box, None, min(sure, default=None))
            group = []
            names = []


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
