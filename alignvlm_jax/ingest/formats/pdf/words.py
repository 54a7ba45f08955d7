"""The words of a PDF page as a person sees them, with their boxes in pixels of the drawn page."""

import collections
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
"""Largest tangent of the angle between text and an axis of the page, about 5 degrees.

Text that slants more is left out: its box would mostly hold other things.
"""
ASCENT = 0.75
DESCENT = 0.25
"""Extent of letters above (ASCENT) and below (DESCENT) the baseline, in ems.

Fonts claim more, with room for glyphs that they hardly ever draw.
"""
MIN_CONTRAST = 16
"""Smallest range of gray levels (of 255) in the box of a word that a person can see."""
MIN_INK = 0.1
"""Smallest area of a visible glyph, in square pixels.

For characters that they cannot draw, as control characters, fonts have a glyph of a hundredth.
"""
MAX_CHARACTERS = 100_000
"""Most characters of a page, with the spaces that pdfium puts between words."""
SIDEWAYS = 2 / 3
"""Fraction of its words from which a page counts as shown sideways; with fewer it is an upright one
with notes at its side."""
MAX_GAP = 0.6
"""Largest gap between two characters of a word, in ems."""

# What pdfium makes of a hyphen at the end of a line, and what other programs write for one.
HYPHENS = "\x02\xad\ufffe"
# An accent without a letter stands for the sign itself: TeX draws a backquote this way.
LONE_ACCENTS = {"\u0300": "`", "\u0301": "´", "\u0302": "^", "\u0303": "~", "\u0308": "¨"}
HIDDEN = (pdfium.FPDF_TEXTRENDERMODE_INVISIBLE, pdfium.FPDF_TEXTRENDERMODE_CLIP)


class PlacedWord(NamedTuple):
    """A word, and whether it runs up or down the page.

    A vertical word has no character edges: they are x coordinates, and would all be the same.
    """

    word: Word
    is_vertical: bool


def read_words(
    page: pypdfium2.PdfPage, to_pixels: np.ndarray, gray: np.ndarray
) -> tuple[list[PlacedWord], int]:
    """Returns the words that a person can see, in the order of the page's content.

    Text that is white on white, covered or outside the page is left out, and so is text at a slant
    or upside down. Invisible text is what OCR recognised in a scan: it counts where the page shows
    ink and no other text.

    Args:
      page: the page.
      to_pixels: float64 [2, 3], from the page's coordinates to pixels.
      gray: uint8 [Y, X], the page as it is drawn.

    Returns:
      The words, and the number of visible words for whose characters the PDF has no Unicode.

    Raises:
      Reject: there is too much text.
    """
    text = _Text(page, to_pixels, gray.shape)
    if turn := text.turn():
        # pdfium orders text by how the page is displayed: sideways, lines would come last to first.
        displayed = page.get_rotation()
        page.set_rotation((displayed + turn) % 360)
        try:
            text = _Text(page, to_pixels, gray.shape)
        finally:
            page.set_rotation(displayed)
    visible = []
    hidden = []
    num_unreadable = 0
    for span in text.spans():
        left, top, right, bottom = (max(0, int(side)) for side in _union(text.ink[span]))
        # Whatever hides a word (its colour, a picture on top, a clip), its box is flat in the
        # drawn page. A last pixel more: boxes end within a pixel.
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
    # [n, 4], also for no word at all.
    boxes = np.array([placed.word.box for placed in visible]).reshape(-1, 4)
    return visible + [
        placed for placed in hidden if not _overlaps(boxes, placed.word.box)
    ], num_unreadable


class _Text:
    """The n characters of a page in pdfium's order, and their boxes in pixels.

    Attributes:
      text: n characters.
      ink: n boxes (left, top, right, bottom) around what is drawn.
      cells: n boxes that contain those of `ink`, reach to the next character and are as high as
        the font.
    """

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
        # [n, 4]: the union of both boxes; italic letters lean out of their cells.
        cells = np.hstack([np.minimum(ink, cells)[:, :2], np.maximum(ink, cells)[:, 2:]])
        ink = _map_boxes(ink, to_pixels)
        cells = _map_boxes(cells, to_pixels)
        centres = (ink[:, :2] + ink[:, 2:]) / 2
        is_on_page = ((centres >= 0) & (centres < self._size)).all(1) & np.isfinite(cells).all(1)
        self._is_on_page = is_on_page.tolist()
        # [n, 2], x and y. A gap, [n - 1], is the larger of the two axes' distances between
        # neighbours, in either direction; it is negative where their cells overlap.
        low = cells[:, :2]
        high = cells[:, 2:]
        gaps = np.maximum(low[1:] - high[:-1], low[:-1] - high[1:]).max(1)
        ems = (high - low).max(1)
        self._is_jump = [True, *(gaps > MAX_GAP * np.maximum(ems[1:], ems[:-1])).tolist()]
        self.ink = ink.tolist()
        self.cells = cells.tolist()

    def spans(self) -> Iterator[slice]:
        """Yields the words, as slices of characters.

        A word is a run of characters on the page without white space and without a jump, as there
        is after a hyphen at the end of a line.
        """
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

    def turn(self) -> int:
        """Returns the degrees, clockwise, by which the page would have to be turned for most of its
        words to stand upright, 0 where they do."""
        turns = collections.Counter(self._turn(span.start) for span in self.spans())
        # The most frequent one, and how many words have it.
        [(turn, count)] = turns.most_common(1) or [(0, 0)]
        return turn if count > SIDEWAYS * turns.total() else 0

    def _turn(self, index: int) -> int:
        """Returns the degrees by which a character would have to be turned, to the nearest 90."""
        matrix = pdfium.FS_MATRIX()
        pdfium.FPDFText_GetMatrix(self._page, index, matrix)
        x, y = self._to_pixels[:, :2] @ (matrix.a, matrix.b)
        if abs(x) >= abs(y):
            return 0 if x >= 0 else 180
        # y grows downwards: text that runs down the page is upright after a turn to the left.
        return 270 if y > 0 else 90

    def spell(self, span: slice) -> tuple[str, list[float]] | None:
        """Returns the text of a word (Unicode NFC) and the left edge of each of its characters.

        The characters that one glyph shows (a ligature, a letter with accents) share its width
        evenly. Returns None if the PDF has no Unicode for a character.
        """
        glyphs: list[list] = []  # text, left, right
        for i in range(span.start, span.stop):
            left, top, right, bottom = self.ink[i]
            seen = _seen(self.text[i], (right - left) * (bottom - top) > MIN_INK)
            if seen is None:
                return None
            # pdfium spells a ligature as several characters with the same box.
            is_same_glyph = i > span.start and self.cells[i] == self.cells[i - 1]
            if glyphs and seen and (is_same_glyph or unicodedata.combining(seen[0])):
                glyphs[-1][0] += seen
            elif seen:
                glyphs.append([LONE_ACCENTS.get(seen, seen), self.cells[i][0], self.cells[i][2]])
        text = ""
        lefts = []
        # Normalised glyph by glyph: over the whole word the number of characters could change, and
        # edges would not fit.
        for glyph, left, right in glyphs:
            composed = unicodedata.normalize("NFC", glyph)
            text += composed
            lefts += [left + (right - left) * i / len(composed) for i in range(len(composed))]
        return text, lefts

    def place(self, span: slice, text: str, lefts: list[float]) -> PlacedWord | None:
        """Returns a word with its box, cut at the page's border.

        Returns None if the word stands at a slant or upside down.
        """
        matrix = pdfium.FS_MATRIX()
        x = c_double()
        y = c_double()
        pdfium.FPDFText_GetMatrix(self._page, span.start, matrix)
        # Directions in pixels, [2]: along the baseline, and from it to the top of the letters,
        # which is a negative y.
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
        # The usual height of letters, within what the font claims, but always around all ink.
        top = min(ink[1], max(baseline - ASCENT * em, cell[1]))
        bottom = max(ink[3], min(baseline + DESCENT * em, cell[3]))
        box = self._cut((cell[0], top, cell[2], bottom))
        # Text from right to left: the edges of a record ascend, so it goes without.
        if lefts[0] > lefts[-1]:
            return PlacedWord(Word(text, box), is_vertical=False)
        # Kerning may pull a letter back over the one before it.
        edges = itertools.accumulate((*lefts, cell[2]), max)
        return PlacedWord(
            Word(text, box, tuple(round(min(max(edge, box[0]), box[2]), 2) for edge in edges)),
            is_vertical=False,
        )

    def _cut(self, box: Sequence[float]) -> Box:
        """Returns a box cut at the page's border and rounded to hundredths of a pixel."""
        left, top, right, bottom = (
            round(min(max(float(side), 0.0), limit), 2)
            for side, limit in zip(box, self._size * 2, strict=True)
        )
        return left, top, right, bottom

    def is_hidden(self, span: slice) -> bool:
        """Whether a word's text is invisible by its rendering mode, as that of OCR is."""
        drawn_by = pdfium.FPDFText_GetTextObject(self._page, span.start)
        return bool(drawn_by) and pdfium.FPDFTextObj_GetTextRenderMode(drawn_by) in HIDDEN


@functools.lru_cache(maxsize=4096)
def _seen(character: str, has_ink: bool) -> str | None:
    """Returns what a person reads where a character is drawn.

    Returns "" if nothing is seen, and None if the PDF does not say (as for a private-use code).
    """
    if character in HYPHENS:
        return "-" if has_ink else ""
    category = unicodedata.category(character)
    if character == "\ufffd" or category in ("Co", "Cn") or (category == "Cc" and has_ink):
        return None
    return "" if category in ("Cc", "Cf") else character


def _decode(codes: list[int]) -> str:
    """Returns a text with exactly one character for each of pdfium's codes.

    pdfium gives two codes, a surrogate pair, for a character beyond 16 bits: the first becomes the
    character and the second a word joiner, which shows nothing, so that indices stay the same.
    Half a pair alone becomes U+FFFD, because UTF-8 cannot encode it.
    """
    text = "".join(chr(code) if code <= sys.maxunicode else "\ufffd" for code in codes)
    text = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: _joined(pair[0]) + "\u2060", text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _joined(pair: str) -> str:
    """Returns the character that a surrogate pair stands for."""
    return pair.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _map_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Returns boxes, float64 [n, 4], mapped by a matrix [2, 3]; min comes before max again."""
    # [n, 2 corners, 2]: the y axis is flipped, so the corners have to be sorted anew.
    corners = boxes.reshape(-1, 2, 2) @ matrix[:, :2].T + matrix[:, 2]
    return np.hstack([corners.min(1), corners.max(1)])


def _union(boxes: Sequence[Sequence[float]]) -> Box:
    """Returns the smallest box around some boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _overlaps(boxes: np.ndarray, box: Box) -> bool:
    """Whether a box overlaps any of `boxes`, float64 [n, 4]."""
    return bool(((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(1).any())
