"""The words of a PDF page as a person sees them, with their boxes in pixels of the drawn page."""

import functools
import unicodedata
from collections.abc import Iterator
from ctypes import c_double
from typing import NamedTuple

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.data.schema import Word

MAX_SLANT = 0.09
"""Tangent of 5 degrees. Text that leans further off the page's axes is left out: its box is mostly other things."""
ASCENT, DESCENT = 0.75, 0.25
"""How far letters reach from the baseline, in ems. Fonts claim more, with room for what they hardly ever draw."""
MIN_CONTRAST = 16
"""Gray levels of 255 that a word's box must span; in less nobody sees a word."""
MAX_GAP = 0.6
"""In ems, between the characters of a word."""

# What pdfium makes of a hyphen at the end of a line, and what others write for it.
HYPHENS = "\x02\xad\ufffe"
# An accent without a letter is a sign of its own: TeX draws a backquote so.
LONE_ACCENTS = {"\u0300": "`", "\u0301": "´", "\u0302": "^", "\u0303": "~", "\u0308": "¨"}
HIDDEN = (pdfium.FPDF_TEXTRENDERMODE_INVISIBLE, pdfium.FPDF_TEXTRENDERMODE_CLIP)


class PlacedWord(NamedTuple):
    """A word, and whether it runs up or down the page. Such a word has no edges: they would not lie along x."""

    word: Word
    is_vertical: bool


def read_words(page: pypdfium2.PdfPage, to_pixels: np.ndarray, gray: np.ndarray) -> tuple[list[PlacedWord], int]:
    """Reads the words that can be seen, in the order of the page's content.

    What is white on white, covered or outside the page is not seen, nor what stands at a slant or upside down.
    Invisible text is that which was recognised in a scan: it counts where the page shows ink and no other text.

    Args:
      page: of pypdfium2.
      to_pixels: float64 [2, 3], from the page's coordinates to pixels.
      gray: uint8 [Y, X], the page as it is drawn.

    Returns:
      The words, and how many more can be seen but not told: the PDF has no Unicode for their characters.
    """
    text = _Text(page, to_pixels, gray.shape)
    visible, hidden, num_unreadable = [], [], 0
    for span in text.spans():
        left, top, right, bottom = _union(text.ink[span]).clip(0)
        ink = gray[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
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
    return visible + [placed for placed in hidden if not _overlaps(boxes, placed.word.box)], num_unreadable


class _Text:
    """The n characters of a page in pdfium's order. Boxes are left, top, right, bottom in pixels: `ink` [n, 4] is what
    is drawn, `cell` [n, 4] reaches to the next character, is as high as the font, and holds `ink`."""

    def __init__(self, page: pypdfium2.PdfPage, to_pixels: np.ndarray, shape: tuple[int, int]):
        self._page, self._to_pixels, self._size = page.get_textpage(), to_pixels, np.array(shape[::-1], float)
        count = self._page.count_chars()
        self.text = "".join(_character(pdfium.FPDFText_GetUnicode(self._page, i)) for i in range(count))
        ink, cell = np.zeros((count, 4)), np.zeros((count, 4))
        left, right, bottom, top, loose = c_double(), c_double(), c_double(), c_double(), pdfium.FS_RECTF()
        for i, character in enumerate(self.text):
            if not character.isspace():
                pdfium.FPDFText_GetCharBox(self._page, i, left, right, bottom, top)
                ink[i] = left.value, bottom.value, right.value, top.value
                pdfium.FPDFText_GetLooseCharBox(self._page, i, loose)
                cell[i] = loose.left, loose.bottom, loose.right, loose.top
        cell = np.hstack([np.minimum(ink, cell)[:, :2], np.maximum(ink, cell)[:, 2:]])
        self.ink, self.cell = _map_boxes(ink, to_pixels), _map_boxes(cell, to_pixels)

    def spans(self) -> Iterator[slice]:
        """Words: runs of characters on the page, without white space and without a jump, as after a hyphen at the end
        of a line."""
        centres = (self.ink[:, :2] + self.ink[:, 2:]) / 2
        is_on_page = ((centres >= 0) & (centres < self._size)).all(1)
        low, high = self.cell[:, :2], self.cell[:, 2:]
        gaps = np.maximum(low[1:] - high[:-1], low[:-1] - high[1:]).max(1)
        ems = (high - low).max(1)
        is_jump = np.concatenate([[True], gaps > MAX_GAP * np.maximum(ems[1:], ems[:-1])])
        start = None
        for i, character in enumerate(self.text):
            is_part = is_on_page[i] and not character.isspace()
            if start is not None and (not is_part or is_jump[i]):
                yield slice(start, i)
                start = None
            if is_part and start is None:
                start = i
        if start is not None:
            yield slice(start, len(self.text))

    def spell(self, span: slice) -> tuple[str, list[float]] | None:
        """Returns the text of a word in normal form C and the left edge of each of its characters, or None if it cannot
        be told. The characters that one glyph shows (a ligature, a letter with accents) share its width evenly."""
        glyphs: list[list] = []  # text, left, right
        for i in range(span.start, span.stop):
            left, top, right, bottom = self.ink[i]
            seen = _seen(self.text[i], bool((right - left) * (bottom - top) > 0.1))
            if seen is None:
                return None
            is_same_glyph = i > span.start and (self.cell[i] == self.cell[i - 1]).all()
            if glyphs and seen and (is_same_glyph or unicodedata.combining(seen[0])):
                glyphs[-1][0] += seen
            elif seen:
                glyphs.append([LONE_ACCENTS.get(seen, seen), self.cell[i, 0], self.cell[i, 2]])
        text, lefts = "", []
        for glyph, left, right in glyphs:
            composed = unicodedata.normalize("NFC", glyph)
            text += composed
            lefts += [left + (right - left) * i / len(composed) for i in range(len(composed))]
        return text, lefts

    def place(self, span: slice, text: str, lefts: list[float]) -> PlacedWord | None:
        """Returns a word with its box, cut at the page's border; None where it stands at a slant or upside down."""
        matrix, x, y = pdfium.FS_MATRIX(), c_double(), c_double()
        pdfium.FPDFText_GetMatrix(self._page, span.start, matrix)
        along = self._to_pixels[:, :2] @ (matrix.a, matrix.b)
        up = self._to_pixels[:, :2] @ (matrix.c, matrix.d)
        ink, cell = _union(self.ink[span]), _union(self.cell[span])
        limit = np.tile(self._size, 2)
        if abs(along[0]) <= MAX_SLANT * abs(along[1]):
            return PlacedWord(Word(text, _numbers(ink.clip(0, limit))), is_vertical=True)
        if along[0] <= 0 or up[1] >= 0 or abs(along[1]) > MAX_SLANT * along[0]:
            return None
        em = -up[1] * pdfium.FPDFText_GetFontSize(self._page, span.start)
        pdfium.FPDFText_GetCharOrigin(self._page, span.start, x, y)
        baseline = self._to_pixels[1] @ (x.value, y.value, 1)
        top = min(ink[1], max(baseline - ASCENT * em, cell[1]))
        bottom = max(ink[3], min(baseline + DESCENT * em, cell[3]))
        box = np.array([cell[0], top, cell[2], bottom]).clip(0, limit)
        edges = np.array([*lefts, cell[2]]).clip(0, self._size[0])
        if edges[0] > edges[-2]:  # from right to left: the schema has no such edges
            return PlacedWord(Word(text, _numbers(box)), is_vertical=False)
        edges = np.maximum.accumulate(edges)  # kerning may pull a letter back over the one before
        return PlacedWord(Word(text, _numbers(box), _numbers(edges)), is_vertical=False)

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
    if category in ("Cc", "Cf"):
        return ""
    return unicodedata.normalize("NFKC", character) if "\ufb00" <= character <= "\ufb06" else character


def _character(code: int) -> str:
    """Half a surrogate pair is no character, and no encoder takes it."""
    return chr(code) if code <= 0x10FFFF and not 0xD800 <= code < 0xE000 else "\ufffd"


def _map_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    corners = boxes.reshape(-1, 2, 2) @ matrix[:, :2].T + matrix[:, 2]
    return np.hstack([corners.min(1), corners.max(1)])


def _union(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


def _overlaps(boxes: np.ndarray, box: tuple[float, ...]) -> bool:
    return bool(((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(1).any())


def _numbers(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.round(2).tolist())
