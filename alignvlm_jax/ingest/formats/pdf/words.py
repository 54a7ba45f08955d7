"""The words of a PDF page as a person sees them, with their boxes in pixels of the drawn page."""

import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from ctypes import c_double
from typing import NamedTuple

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.data.record import Box, Word
from alignvlm_jax.ingest.formats.base import Reject

MAX_SLANT = 0.09
"""Tangent of 5 degrees.

Text that leans further off the page's axes is left out: its box is mostly other things.
"""
ASCENT = 0.75
DESCENT = 0.25
"""How far letters reach from the baseline, in ems.

Fonts claim more, with room for what they hardly ever draw.
"""
MIN_CONTRAST = 16
"""Gray levels of 255 that a word's box must span; in less nobody sees a word."""
MIN_INK = 0.1
"""Square pixels of a glyph.

For what they cannot draw, as control characters, fonts have a glyph of a hundredth.
"""
MAX_CHARACTERS = 100_000
"""Of a page, with the spaces that pdfium puts between words."""
MAX_GAP = 0.6
"""In ems, between the characters of a word."""

# What pdfium makes of a hyphen at the end of a line, and what others write for it.
HYPHENS = "\x02\xad\ufffe"
# An accent without a letter is a sign of its own: TeX draws a backquote so.
LONE_ACCENTS = {"\u0300": "`", "\u0301": "´", "\u0302": "^", "\u0303": "~", "\u0308": "¨"}
HIDDEN = (pdfium.FPDF_TEXTRENDERMODE_INVISIBLE, pdfium.FPDF_TEXTRENDERMODE_CLIP)


class PlacedWord(NamedTuple):
    """A word, and whether it runs up or down the page.

    Such a word has no edges: they would not lie along x.
    """

    word: Word
    is_vertical: bool


def read_words(
    page: pypdfium2.PdfPage, to_pixels: np.ndarray, gray: np.ndarray
) -> tuple[list[PlacedWord], int]:
    """Reads the words that can be seen, in the order of the page's content.

    What is white on white, covered or outside the page is not seen, nor what stands at a slant or
    upside down. Invisible text is that which was recognised in a scan: it counts where the page
    shows ink and no other text.

    Args:
      page: of pypdfium2.
      to_pixels: float64 [2, 3], from the page's coordinates to pixels.
      gray: uint8 [Y, X], the page as it is drawn.

    Returns:
      The words, and how many more can be seen but not told: the PDF has no Unicode for their
      characters.

    Raises:
      Reject: there is too much text.
    """
    text = _Text(page, to_pixels, gray.shape)
    visible = []
    hidden = []
    num_unreadable = 0
    for span in text.spans():
        left, top, right, bottom = (max(0, int(side)) for side in _union(text.ink[span]))
        ink = gray[top : bottom + 1, left : right + 1]
        if not ink.size or int(ink.max()) - int(ink.min()) < MIN_CONTRAST:
            continue
        spelled = text.spell(span)
        if spelled is None:
            num_unreadable += 1
        elif spelled[0]:
            placed = text.place(span, *spelled)
            if placed is not None:
                (hidden if text.is_hidden(span) else visible).append(placed)
    boxes = np.array([placed.word.box for placed in visible]).reshape(-1, 4)
    return visible + [
        placed for placed in hidden if not _overlaps(boxes, placed.word.box)
    ], num_unreadable


class _Text:
    """The n characters of a page in pdfium's order, and their boxes: left, top, right, bottom in
    pixels. Those of `ink` hold what is drawn; those of `cells` hold that too, reach to the next
    character and are as high as the font."""

    def __init__(self, page: pypdfium2.PdfPage, to_pixels: np.ndarray, shape: tuple[int, int]):
        self._page = page.get_textpage()
        self._to_pixels = to_pixels
        self._size = shape[::-1]
        count = self._page.count_chars()
        if count > MAX_CHARACTERS:
            raise Reject(
                f"a page has too much text ({count:,} characters; at most {MAX_CHARACTERS:,})"
            )
        self.text = _decode([pdfium.FPDFText_GetUnicode(self._page, i) for i in range(count)])
        ink = np.zeros((count, 4))
        cells = np.zeros((count, 4))
        left = c_double()
        right = c_double()
        bottom = c_double()
        top = c_double()
        loose = pdfium.FS_RECTF()
        for i, character in enumerate(self.text):
            if not character.isspace():
                pdfium.FPDFText_GetCharBox(self._page, i, left, right, bottom, top)
                ink[i] = left.value, bottom.value, right.value, top.value
                pdfium.FPDFText_GetLooseCharBox(self._page, i, loose)
                cells[i] = loose.left, loose.bottom, loose.right, loose.top
        cells = np.hstack([np.minimum(ink, cells)[:, :2], np.maximum(ink, cells)[:, 2:]])
        ink = _map_boxes(ink, to_pixels)
        cells = _map_boxes(cells, to_pixels)
        centres = (ink[:, :2] + ink[:, 2:]) / 2
        is_on_page = ((centres >= 0) & (centres < self._size)).all(1) & np.isfinite(cells).all(1)
        self._is_on_page = is_on_page.tolist()
        low = cells[:, :2]
        high = cells[:, 2:]
        gaps = np.maximum(low[1:] - high[:-1], low[:-1] - high[1:]).max(1)
        ems = (high - low).max(1)
        self._is_jump = [True, *(gaps > MAX_GAP * np.maximum(ems[1:], ems[:-1])).tolist()]
        self.ink = ink.tolist()
        self.cells = cells.tolist()

    def spans(self) -> Iterator[slice]:
        """Words: runs of characters on the page, without white space and without a jump, as after a
        hyphen at the end of a line."""
        start = None
        for i, character in enumerate(self.text):
            is_part = self._is_on_page[i] and not character.isspace()
            if start is not None and (not is_part or self._is_jump[i]):
                yield slice(start, i)
                start = None
            if is_part and start is None:
                start = i
        if start is not None:
            yield slice(start, len(self.text))

    def spell(self, span: slice) -> tuple[str, list[float]] | None:
        """Returns the text of a word in normal form C and the left edge of each of its characters,
        or None if it cannot be told. The characters that one glyph shows (a ligature, a letter with
        accents) share its width evenly."""
        glyphs: list[list] = []  # text, left, right
        for i in range(span.start, span.stop):
            left, top, right, bottom = self.ink[i]
            seen = _seen(self.text[i], (right - left) * (bottom - top) > MIN_INK)
            if seen is None:
                return None
            is_same_glyph = i > span.start and self.cells[i] == self.cells[i - 1]
            if glyphs and seen and (is_same_glyph or unicodedata.combining(seen[0])):
                glyphs[-1][0] += seen
            elif seen:
                glyphs.append([LONE_ACCENTS.get(seen, seen), self.cells[i][0], self.cells[i][2]])
        text = ""
        lefts = []
        for glyph, left, right in glyphs:
            composed = unicodedata.normalize("NFC", glyph)
            text += composed
            lefts += [left + (right - left) * i / len(composed) for i in range(len(composed))]
        return text, lefts

    def place(self, span: slice, text: str, lefts: list[float]) -> PlacedWord | None:
        """Returns a word with its box, cut at the page's border; None where it stands at a slant or
        upside down."""
        matrix = pdfium.FS_MATRIX()
        x = c_double()
        y = c_double()
        pdfium.FPDFText_GetMatrix(self._page, span.start, matrix)
        along = self._to_pixels[:, :2] @ (matrix.a, matrix.b)
        up = self._to_pixels[:, :2] @ (matrix.c, matrix.d)
        ink = _union(self.ink[span])
        cell = _union(self.cells[span])
        if abs(along[0]) <= MAX_SLANT * abs(along[1]):
            return PlacedWord(Word(text, self._cut(ink)), is_vertical=True)
        if up[1] >= 0 or abs(along[1]) > MAX_SLANT * along[0]:
            return None
        em = -up[1] * pdfium.FPDFText_GetFontSize(self._page, span.start)
        pdfium.FPDFText_GetCharOrigin(self._page, span.start, x, y)
        baseline = self._to_pixels[1] @ (x.value, y.value, 1)
        top = min(ink[1], max(baseline - ASCENT * em, cell[1]))
        bottom = max(ink[3], min(baseline + DESCENT * em, cell[3]))
        box = self._cut((cell[0], top, cell[2], bottom))
        if lefts[0] > lefts[-1]:  # from right to left: the schema has no such edges
            return PlacedWord(Word(text, box), is_vertical=False)
        # Kerning may pull a letter back over the one before it.
        edges = itertools.accumulate((*lefts, cell[2]), max)
        return PlacedWord(
            Word(text, box, tuple(round(min(max(edge, box[0]), box[2]), 2) for edge in edges)),
            is_vertical=False,
        )

    def _cut(self, box: Sequence[float]) -> Box:
        """A box cut at the page's border, in hundredths of a pixel."""
        left, top, right, bottom = (
            round(min(max(float(side), 0.0), limit), 2)
            for side, limit in zip(box, self._size * 2, strict=True)
        )
        return left, top, right, bottom

    def is_hidden(self, span: slice) -> bool:
        """Whether a word is marked as invisible."""
        drawn_by = pdfium.FPDFText_GetTextObject(self._page, span.start)
        return bool(drawn_by) and pdfium.FPDFTextObj_GetTextRenderMode(drawn_by) in HIDDEN


@functools.lru_cache(maxsize=4096)
def _seen(character: str, has_ink: bool) -> str | None:
    """What a person reads where a character is drawn; None where the PDF does not say."""
    if character in HYPHENS:
        return "-" if has_ink else ""
    category = unicodedata.category(character)
    if character == "\ufffd" or category in ("Co", "Cn") or (category == "Cc" and has_ink):
        return None
    return "" if category in ("Cc", "Cf") else character


def _decode(codes: list[int]) -> str:
    """A character for each code. pdfium has two for what lies beyond 16 bits; the second becomes a
    joiner, which shows nothing. Half a pair alone is no character, and no encoder takes it."""
    text = "".join(chr(code) if code <= sys.maxunicode else "\ufffd" for code in codes)
    text = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: _joined(pair[0]) + "\u2060", text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _joined(pair: str) -> str:
    return pair.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _map_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    corners = boxes.reshape(-1, 2, 2) @ matrix[:, :2].T + matrix[:, 2]
    return np.hstack([corners.min(1), corners.max(1)])


def _union(boxes: Sequence[Sequence[float]]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _overlaps(boxes: np.ndarray, box: Box) -> bool:
    return bool(((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(1).any())
