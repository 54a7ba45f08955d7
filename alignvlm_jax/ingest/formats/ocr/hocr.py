"""hOCR: HTML whose elements say by their class what they are, and by their title where."""

import codecs
import html
import re
from html.parser import HTMLParser
from typing import NamedTuple

from alignvlm_jax.data.record import Box, Word
from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.ocr import page as page_lib
from alignvlm_jax.ingest.formats.ocr.page import OcrPage

LINES = {"ocr_line", "ocrx_line", "ocr_header", "ocr_footer", "ocr_caption", "ocr_textfloat"}
"""Classes of lines: Tesseract has some of its own for those that are no running text."""
WORDS = {"ocrx_word", "ocr_word"}
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}
"""Elements that have no end."""
UNSEEN = ("script", "style")
"""Elements whose text no page shows."""
MAX_DEPTH = 1000
"""Depth of elements: paragraphs that a file never ends lie within each other."""
NUMBER = r"\s+(-?[\d.]+)"
BOX = re.compile(rf"\bbbox{NUMBER}{NUMBER}{NUMBER}{NUMBER}")
CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
HEAD_BYTES = 1024
"""Bytes in which a file says how it is encoded, as browsers look for it."""
ENCODING = re.compile(rb"(?i)<(?:\?xml|meta)\b[^>]*?(?:charset|encoding)\s*=\s*[\"']?([\w.-]+)")
CONFIDENCE = re.compile(rf"\bx_wconf{NUMBER}")


class _Open(NamedTuple):
    """An element that has begun."""

    tag: str
    kind: str  # "page", "line", "word", or ""
    title: str


def read_pages(content: bytes) -> tuple[OcrPage, ...]:
    """Returns the pages of a hOCR file, as they follow each other; raises Reject if it has none."""
    text = _decoded(content)
    # Of XHTML they are text, and html.parser takes them for comments.
    text = CDATA.sub(lambda found: html.escape(found[1]), text)
    parser = _Parser()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError as err:  # html.parser's, of markup that it cannot make out
        raise Reject(f"hOCR that is damaged ({err})") from err
    parser.end_all()
    if not parser.pages:
        raise Reject("no hOCR: no element is of class ocr_page")
    return tuple(
        OcrPage(size, page_lib.without_empty(lines))
        for size, lines in zip(parser.sizes, parser.pages, strict=True)
    )


def _decoded(content: bytes) -> str:
    """Returns the text of a file, in the encoding that it names at its beginning, or else UTF-8."""
    found = ENCODING.search(content[:HEAD_BYTES])
    name = found[1].decode() if found else "utf-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-16"
    elif content.startswith(codecs.BOM_UTF8) or name.lower() == "utf8":
        name = "utf-8"
    text = content.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode(name)
    except UnicodeDecodeError as err:
        raise Reject(f"hOCR that is no {name.upper()} ({err.reason} at byte {err.start})") from err
    except (LookupError, UnicodeError) as err:  # also of what is no encoding of texts
        raise Reject(f"hOCR of an unknown encoding ({name:.40})") from err


class _Parser(HTMLParser):
    """Collects the pages.

    Attributes:
      sizes: width and height of each page; None if it does not say.
      pages: of each page its lines of words; the origin is the page's own corner.
    """

    def __init__(self):
        super().__init__()
        self.sizes: list[tuple[float, float] | None] = []
        self.pages: list[list[list[Word]]] = []
        self._open: list[_Open] = []
        self._corner = (0.0, 0.0)
        self._word = ""
        self._line = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            return
        given = {name: value or "" for name, value in attrs}
        classes = set(given.get("class", "").split())
        # The name of the image is quoted, and may hold anything.
        title = re.sub(r"\"[^\"]*\"|'[^']*'", "", given.get("title", ""))
        kind = ""
        if "ocr_page" in classes:
            kind = "page"
            if outer := [one.kind for one in self._open if one.kind]:
                raise Reject(f"hOCR in which a page stands within a {outer[0]}")
            box = _box(title)
            self._corner = box[:2] if box else (0.0, 0.0)
            self.sizes.append((box[2] - box[0], box[3] - box[1]) if box else None)
            self.pages.append([])
        elif self.pages and classes & LINES:
            kind = "line"
            self._line = ""
            self.pages[-1].append([])
        elif self.pages and classes & WORDS:
            kind = "word"
            self._word = ""
        if len(self._open) == MAX_DEPTH:
            raise Reject(f"hOCR that is nested more than {MAX_DEPTH} deep")
        self._open.append(_Open(tag, kind, title))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if any(one.tag in UNSEEN for one in self._open):
            return
        kinds = [one.kind for one in self._open if one.kind]
        # The characters of a word may be elements of their own within it.
        if "word" in kinds:
            self._word += data
        elif kinds[-1:] == ["line"]:
            self._line += data
        elif kinds[-1:] == ["page"] and data.strip():
            raise Reject(f"hOCR with text that is of no line ({data.strip()[:20]!r})")

    def handle_endtag(self, tag: str) -> None:
        if not any(one.tag == tag for one in self._open):
            return
        # What has no end of its own ends with what it stands in.
        while self._end(self._open.pop()) != tag:
            pass

    def end_all(self) -> None:
        """Ends what the file has left open."""
        while self._open:
            self._end(self._open.pop())

    def _end(self, ended: _Open) -> str:
        """Ends an element; returns its tag."""
        text = page_lib.clean(self._word if ended.kind == "word" else self._line)
        if ended.kind == "word" and text:
            if not any(one.kind == "line" for one in self._open):
                self.pages[-1].append([])
            found = CONFIDENCE.search(ended.title)
            confidence = page_lib.confidence_of(found[1], 100.0) if found else None
            self.pages[-1][-1].append(Word(text, self._place(ended, text), None, confidence))
        # A line without words has text of its own; beside words it has no place.
        elif ended.kind == "line" and text and self.pages[-1][-1]:
            raise Reject(f"hOCR with text of a line beside its words ({text[:20]!r})")
        elif ended.kind == "line" and text:
            self.pages[-1][-1] += page_lib.spread(text, self._place(ended, text), None)
        return ended.tag

    def _place(self, element: _Open, text: str) -> Box:
        """Returns the box of an element on its page."""
        box = _box(element.title)
        if box is None:
            raise Reject(f"hOCR in which {text[:20]!r} has no box")
        x, y = self._corner
        return page_lib.box_of(box[0] - x, box[1] - y, box[2] - x, box[3] - y, text)


def _box(title: str) -> Box | None:
    """Returns the box in the title of an element, None if there is none."""
    found = BOX.search(title)
    return page_lib.box_of(*found.groups(), "a title") if found else None
