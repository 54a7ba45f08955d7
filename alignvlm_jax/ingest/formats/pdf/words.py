"""The words of a PDF page as a person sees them, with their boxes in pixels of the drawn page."""

import collections
import functools
import itertools
from typing import NamedTuple

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.data.labels import is_from_the_right
from alignvlm_jax.data.record import Box, Word
from alignvlm_jax.ingest.formats.pdf import characters as characters_lib
from alignvlm_jax.ingest.formats.pdf import spelling
from alignvlm_jax.ingest.formats.pdf.characters import Characters

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
SIDEWAYS = 2 / 3
"""Fraction of its words from which a page counts as shown sideways; with fewer it is an upright one
with notes at its side."""

HIDDEN = (pdfium.FPDF_TEXTRENDERMODE_INVISIBLE, pdfium.FPDF_TEXTRENDERMODE_CLIP)


class PlacedWord(NamedTuple):
    """A word, and how it stands on the page.

    A vertical word has no character edges: they are x coordinates, and would all be the same.

    Attributes:
      word: its text and box.
      is_vertical: whether it runs up or down the page.
      is_bold: whether its font is bold, as far as the font's name says.
      em: the size of its font in pixels.
    """

    word: Word
    is_vertical: bool
    is_bold: bool = False
    em: float = 0.0


def read_words(
    page: pypdfium2.PdfPage, to_pixels: np.ndarray, gray: np.ndarray
) -> tuple[list[PlacedWord], list[Box]]:
    """Returns the words that a person can see, in the order of the page's content.

    Text that is white on white, covered or outside the page is left out, and so is text at a slant
    or upside down. Invisible text is what OCR recognised in a scan: it counts where the page shows
    ink and no other text.

    Args:
      page: the page.
      to_pixels: float64 [2, 3], from the page's coordinates to pixels.
      gray: uint8 [Y, X], the page as it is drawn.

    Returns:
      The words, and the boxes of visible words for whose characters the PDF has no Unicode.

    Raises:
      Reject: there is too much text.
    """
    text = _Text(Characters(page, to_pixels, gray.shape))
    if turn := text.turn():
        # pdfium orders text by how the page is displayed: sideways, lines would come last to first.
        displayed = page.get_rotation()
        page.set_rotation((displayed + turn) % 360)
        try:
            text = _Text(Characters(page, to_pixels, gray.shape))
        finally:
            page.set_rotation(displayed)
    visible = []
    hidden = []
    unreadable = []
    for index in range(len(text.spans)):
        # Whatever hides a word (its colour, a picture on top, a clip), its box is flat in the
        # drawn page.
        if text.is_drawing[index] or not _has_contrast(gray, text.inks[index]):
            continue
        spelled = text.spell(index)
        if spelled is None:
            unreadable.append(tuple(text.inks[index]))
        elif spelled[0]:
            placed = text.place(index, *spelled)
            if placed is not None:
                kept = hidden if text.modes[index] in HIDDEN else visible
                is_next = index > 0 and text.spans[index - 1].stop == text.spans[index].start
                if is_next and kept and _ends_with(kept[-1], placed):
                    kept[-1] = _joined(kept[-1], placed)
                else:
                    kept.append(placed)
    # [n, 4], also for no word at all.
    boxes = np.array([placed.word.box for placed in visible]).reshape(-1, 4)
    return visible + [
        placed for placed in hidden if not _overlaps(boxes, placed.word.box)
    ], unreadable


def gap(a: PlacedWord, b: PlacedWord) -> float:
    """Returns the distance from one word of a line to the next, in ems."""
    # A source may not know the size of its font.
    em = max(a.em, b.em) or a.word.box[3] - a.word.box[1] or 1
    return (b.word.box[0] - a.word.box[2]) / em


def union(boxes: list[Box]) -> Box:
    """Returns the smallest box around some boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _ends_with(word: PlacedWord, sign: PlacedWord) -> bool:
    """Whether a sign stands at the end, to the left, of a word from right to left: where that is
    stored as it is drawn, the sign follows the first letter."""
    is_sign = not any(map(str.isalnum, sign.word.text))
    is_near = abs(word.word.box[0] - sign.word.box[2]) < 0.2 * word.em
    return is_sign and is_near and is_from_the_right(word.word.text)


def _joined(word: PlacedWord, sign: PlacedWord) -> PlacedWord:
    box = union([word.word.box, sign.word.box])
    return word._replace(word=Word(word.word.text + sign.word.text, box))


class _Text:
    """The n words of a page.

    Attributes:
      spans: their characters, n slices.
      inks: n boxes around what is drawn.
      modes: rendering modes of their first characters; None where nothing is known to draw them.
    """

    def __init__(self, characters: Characters):
        self._text = characters.text
        self._size = characters.size
        self._ink = characters.ink
        self._cell = characters.cells
        self.spans = characters.spans()
        starts = [span.start for span in self.spans]
        inks = _unions(characters.ink, self.spans)
        self.inks = inks.tolist()
        # pdfium spells a ligature as several characters with the same box.
        is_joined = np.zeros(len(self._text), bool)
        is_joined[1:] = (characters.cells[1:] == characters.cells[:-1]).all(1)
        self._is_joined = is_joined.tolist()
        # Directions in pixels, each [2]: along the baseline, and from it to the top of the letters,
        # which is a negative y.
        directions = characters.matrices(starts)
        self._sizes = characters.sizes(starts)
        cells = _unions(characters.cells, self.spans)
        ems = -directions[:, 1, 1] * self._sizes
        # A list: numbers of numpy, a word at a time, are slow.
        self._directions = directions.tolist()
        boxes = _cut(_place(cells, inks, ems, characters.baselines(starts)), self._size)
        self._boxes = boxes.tolist()
        self._ink_boxes = _cut(inks, self._size).tolist()
        # [n]: where the cell of each character starts, within the box of its word.
        owner = np.full(len(self._text), -1)
        for word, span in enumerate(self.spans):
            owner[span] = word
        sides = np.append(boxes, [[0, 0, 0, 0]], 0)[owner]
        within = np.clip(characters.cells[:, 0], sides[:, 0], sides[:, 2])
        self._lefts = within.round(2).tolist()
        # A word's first character stands for all of it: words of several fonts are rare.
        objects = characters.objects(starts)
        # Most words are drawn by few objects, or share their object with their neighbours.
        mode = functools.cache(characters_lib.render_mode)
        name_of = functools.cache(characters_lib.font_name)
        names = [name_of(drawn_by) if drawn_by else "" for drawn_by in objects]
        self.modes = [mode(drawn_by) if drawn_by else None for drawn_by in objects]
        # Fonts have a weight of their own, but most files leave it out.
        self._is_bold = [bool(characters_lib.BOLD.search(name)) for name in names]
        self.is_drawing = [bool(characters_lib.DRAWN.search(name)) for name in names]

    def turn(self) -> int:
        """Returns the degrees, clockwise, by which the page would have to be turned for most of its
        words to stand upright, 0 where they do."""
        turns = collections.Counter(_turn(*along) for along, _ in self._directions)
        # The most frequent one, and how many words have it.
        [(turn, count)] = turns.most_common(1) or [(0, 0)]
        return turn if count > SIDEWAYS * turns.total() else 0

    def spell(self, index: int) -> tuple[str, list[float]] | None:
        """Returns the text of a word (Unicode NFC) and the left edge of each of its characters.

        The characters that one glyph shows (a ligature, a letter with accents) share its width
        evenly. Returns None if the PDF has no Unicode for a character.
        """
        span = self.spans[index]
        word = self._text[span]
        is_joined = self._is_joined[span]
        if spelling.is_plain(word) and not any(is_joined[1:]):
            return word, self._lefts[span]
        glyphs = spelling.read_glyphs(
            word, self._ink[span].tolist(), self._cell[span].tolist(), is_joined
        )
        if glyphs is None:
            return None
        text = ""
        lefts = []
        start, _, stop, _ = self._boxes[index]
        for shown, left, right in glyphs:
            text += shown
            parts = (left + (right - left) * i / len(shown) for i in range(len(shown)))
            lefts += [round(min(max(part, start), stop), 2) for part in parts]
        return text, lefts

    def place(self, index: int, text: str, lefts: list[float]) -> PlacedWord | None:
        """Returns a word with its box, cut at the page's border.

        Returns None if the word stands at a slant or upside down.
        """
        along, up = self._directions[index]
        is_bold = self._is_bold[index]
        if abs(along[0]) <= MAX_SLANT * abs(along[1]):
            em = abs(up[0]) * self._sizes[index]
            return PlacedWord(Word(text, tuple(self._ink_boxes[index])), True, is_bold, em)
        if up[1] >= 0 or abs(along[1]) > MAX_SLANT * along[0]:
            return None
        em = -up[1] * self._sizes[index]
        box = tuple(self._boxes[index])
        # Text from right to left: the edges of a record ascend, so it goes without.
        if lefts[0] > lefts[-1]:
            return PlacedWord(Word(text, box), False, is_bold, em)
        # Kerning may pull a letter back over the one before it.
        edges = (*itertools.accumulate(lefts, max), box[2])
        return PlacedWord(Word(text, box, edges), False, is_bold, em)


def _place(cells: np.ndarray, inks: np.ndarray, ems: np.ndarray, baselines: np.ndarray):
    """Returns the boxes of upright words, float64 [n, 4].

    They have the usual height of letters, within what the font claims, but always around all ink.

    Args:
      cells: boxes around the cells of their characters, [n, 4].
      inks: boxes around what is drawn, [n, 4].
      ems: the sizes of their fonts in pixels, [n].
      baselines: the y coordinates of their baselines, [n].
    """
    tops = np.minimum(inks[:, 1], np.maximum(baselines - ASCENT * ems, cells[:, 1]))
    bottoms = np.maximum(inks[:, 3], np.minimum(baselines + DESCENT * ems, cells[:, 3]))
    return np.stack([cells[:, 0], tops, cells[:, 2], bottoms], 1)


def _has_contrast(gray: np.ndarray, box: Box) -> bool:
    """Whether anything can be seen in a box of the page, uint8 [Y, X]."""
    left, top, right, bottom = (max(0, int(side)) for side in box)
    # The row in the middle has ink of most words, and few bytes are faster than small arrays.
    row = gray[(top + bottom) // 2, left : right + 1].tobytes() if bottom < len(gray) else b""
    if row and max(row) - min(row) >= MIN_CONTRAST:
        return True
    # A last pixel more: boxes end within a pixel.
    ink = gray[top : bottom + 1, left : right + 1]
    return ink.size > 0 and int(ink.max()) - int(ink.min()) >= MIN_CONTRAST


def _turn(x: float, y: float) -> int:
    """Returns the degrees by which text of a direction would have to be turned, to the nearest 90.

    y grows downwards.
    """
    if abs(x) >= abs(y):
        return 0 if x >= 0 else 180
    # Text that runs down the page is upright after a turn to the left.
    return 270 if y > 0 else 90


def _unions(boxes: np.ndarray, spans: list[slice]) -> np.ndarray:
    """Returns the smallest box around the characters of each of n words, float64 [n, 4]."""
    if not spans:
        return np.zeros((0, 4))
    # Where words start and stop by turns; what stands between words is reduced for nothing.
    ends = np.array([(span.start, span.stop) for span in spans]).ravel()
    # An end may be the end of the array, which reduceat does not take.
    padded = np.vstack([boxes, boxes[-1:]])
    low = np.minimum.reduceat(padded[:, :2], ends)[::2]
    high = np.maximum.reduceat(padded[:, 2:], ends)[::2]
    return np.hstack([low, high])


def _cut(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns boxes cut at the page's border and rounded to hundredths of a pixel."""
    return np.clip(boxes, 0, size * 2).round(2)


def _overlaps(boxes: np.ndarray, box: Box) -> bool:
    """Whether a box overlaps any of `boxes`, float64 [n, 4]."""
    return bool(((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(1).any())
