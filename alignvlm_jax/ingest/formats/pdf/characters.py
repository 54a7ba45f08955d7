"""The characters of a PDF page with their boxes in pixels, read in bulk.

A page has thousands of characters, and pdfium tells about one a call. Such calls run in `map`,
without Python code between them, and write straight into arrays.
"""

import collections
import ctypes
import itertools
import re
import sys
import unicodedata
from collections.abc import Iterable

import numpy as np
import pypdfium2
from pypdfium2 import raw as pdfium

from alignvlm_jax.ingest.formats.base import Reject
from alignvlm_jax.ingest.formats.pdf.spelling import is_from_the_right

MAX_CHARACTERS = 100_000
"""Most characters of a page, with the spaces that pdfium puts between words."""
MAX_GAP = 0.6
"""Largest gap between two characters of a word, in ems."""
MAX_LOOSE_GAP = 0.2
"""Largest gap that is none in text up or down the page, in ems: pdfium guesses spaces there from
distances along x, which say nothing."""
MIN_GRID = 6
GRID_SLACK = 0.1
GRID_FRACTION = 0.9
"""Fewest pairs of neighbours in a line on a grid, the largest deviation from it, as a fraction of a
step, and the smallest fraction of pairs that deviate no more."""
BOLD = re.compile(r"bold|black|heavy|demi|-medi|bx\d|bx$", re.IGNORECASE)
DRAWN = re.compile(r"(^|\+)(line|lcircle)w?10$", re.IGNORECASE)
"""Fonts of LaTeX's pictures: arrows and arcs, which files call "✛" and "✐"."""
"""What the names of bold fonts have in them; TeX's are CMBX10, or NimbusRomNo9L-Medi."""
MAX_NAME_BYTES = 256


def _prototype(function: object, result: type, *arguments: type):
    """Returns a function of pdfium that takes addresses as numbers.

    pypdfium2's own prototypes make an object of each pointer, and give up Python's lock in each
    call, which costs several times what most of pdfium's functions take.
    """
    address = ctypes.cast(function, ctypes.c_void_p).value
    return ctypes.PYFUNCTYPE(result, *arguments)(address)


_ADDRESS = ctypes.c_void_p
_get_unicode = _prototype(pdfium.FPDFText_GetUnicode, ctypes.c_uint, _ADDRESS, ctypes.c_int)
_is_generated = _prototype(pdfium.FPDFText_IsGenerated, ctypes.c_int, _ADDRESS, ctypes.c_int)
_get_object = _prototype(pdfium.FPDFText_GetTextObject, _ADDRESS, _ADDRESS, ctypes.c_int)
_get_size = _prototype(pdfium.FPDFText_GetFontSize, ctypes.c_double, _ADDRESS, ctypes.c_int)
_get_loose_box = _prototype(
    pdfium.FPDFText_GetLooseCharBox, ctypes.c_int, _ADDRESS, ctypes.c_int, _ADDRESS
)
_get_matrix = _prototype(pdfium.FPDFText_GetMatrix, ctypes.c_int, _ADDRESS, ctypes.c_int, _ADDRESS)
_get_origin = _prototype(
    pdfium.FPDFText_GetCharOrigin, ctypes.c_int, _ADDRESS, ctypes.c_int, _ADDRESS, _ADDRESS
)
_get_box = _prototype(
    pdfium.FPDFText_GetCharBox, ctypes.c_int, _ADDRESS, ctypes.c_int, *[_ADDRESS] * 4
)


class Characters:
    """The n characters of a page in pdfium's order, and their boxes in pixels.

    Attributes:
      text: n characters.
      ink: float64 [n, 4], boxes (left, top, right, bottom) around what is drawn.
      cells: float64 [n, 4], boxes that contain those of `ink`, reach to the next character and are
        as high as the font.
      size: width and height of the drawn page in pixels.
    """

    def __init__(self, page: pypdfium2.PdfPage, to_pixels: np.ndarray, shape: tuple[int, int]):
        # Held for as long as its address is used.
        self._page = page.get_textpage()
        self._address = ctypes.cast(self._page.raw, _ADDRESS).value
        self._to_pixels = to_pixels
        self.size = shape[::-1]
        count = self._page.count_chars()
        if count > MAX_CHARACTERS:
            raise Reject(
                f"a page has too much text ({count:,} characters; at most {MAX_CHARACTERS:,})"
            )
        self.text = _decode(list(map(_get_unicode, itertools.repeat(self._address), range(count))))
        is_space = [character.isspace() for character in self.text]
        # [n, (left, right, bottom, top)] and [n, (left, top, right, bottom)], in points.
        ink = self._read(_get_box, range(count), np.float64, 4, [0, 1, 2, 3])
        cells = self._read(_get_loose_box, range(count), np.float32, 4, [0]).astype(np.float64)
        ink = ink[:, [0, 2, 1, 3]]
        cells = cells[:, [0, 3, 2, 1]]
        ink[is_space] = 0
        cells[is_space] = 0
        # [n, 4]: the union of both boxes; italic letters lean out of their cells.
        cells = np.hstack([np.minimum(ink, cells)[:, :2], np.maximum(ink, cells)[:, 2:]])
        self.ink = _map_boxes(ink, to_pixels)
        self.cells = _map_boxes(cells, to_pixels)
        self._is_space = np.array(is_space, bool)
        self._indices = list(range(count))
        self._leave_out(self._false_spaces())

    def spans(self) -> list[slice]:
        """Returns the words, as slices of characters.

        A word is a run of characters on the page without white space and without a jump, as there
        is after a hyphen at the end of a line.
        """
        # [n, 2], x and y. A gap, [n - 1], is the larger of the two axes' distances between
        # neighbours, in either direction; it is negative where their cells overlap.
        low = self.cells[:, :2]
        high = self.cells[:, 2:]
        centres = (self.ink[:, :2] + self.ink[:, 2:]) / 2
        is_on_page = ((centres >= 0) & (centres < self.size)).all(1)
        is_part = is_on_page & np.isfinite(self.cells).all(1) & ~self._is_space
        gaps = np.maximum(low[1:] - high[:-1], low[:-1] - high[1:]).max(1)
        ems = (high - low).max(1)
        is_jump = np.ones(len(is_part) + 1, bool)
        is_jump[1:-1] = (gaps > MAX_GAP * np.maximum(ems[1:], ems[:-1])) | self._is_below()
        # [n + 1], padded at both ends: a word starts and stops where being part changes, and at
        # jumps.
        padded = np.concatenate([[False], is_part, [False]])
        starts = np.flatnonzero(padded[1:] & (~padded[:-1] | is_jump))
        stops = np.flatnonzero(padded[:-1] & (~padded[1:] | is_jump))
        return list(map(slice, starts.tolist(), stops.tolist()))

    def _own(self, indices: list[int]) -> list[int]:
        """Returns pdfium's indices of some characters."""
        return [self._indices[i] for i in indices]

    def _false_spaces(self) -> list[int]:
        """Returns the spaces that pdfium guessed within words.

        It guesses them from distances, with which it errs in words up or down the page or from
        right to left, and between narrow letters of a font whose letters are all equally far from
        each other.
        """
        changes = np.diff(self._is_space.astype(np.int8))
        # Runs of white space that stand between two other characters, [m] each: the first of them,
        # and the first one after them.
        starts = np.flatnonzero(changes == 1) + 1
        stops = np.flatnonzero(changes == -1) + 1
        stops = stops[stops > starts[0]] if len(starts) else stops[:0]
        starts = starts[: len(stops)]
        along = self.matrices((starts - 1).tolist())[:, 0]
        is_odd = np.abs(along[:, 0]) < np.abs(along[:, 1])
        is_odd |= np.array([is_from_the_right(self.text[i - 1]) for i in starts.tolist()], bool)
        a = self.cells[starts - 1]
        b = self.cells[stops]
        ems = np.maximum((a[:, 2:] - a[:, :2]).max(1), (b[:, 2:] - b[:, :2]).max(1))
        gaps = np.maximum(b[:, :2] - a[:, 2:], a[:, :2] - b[:, 2:]).max(1)
        is_odd &= gaps < MAX_LOOSE_GAP * ems
        is_odd |= self._is_pitch(starts, stops)
        runs = (
            range(start, stop) for start, stop in zip(starts[is_odd], stops[is_odd], strict=True)
        )
        return [
            i for run in runs if all(_is_generated(self._address, k) == 1 for k in run) for i in run
        ]

    def _is_pitch(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Returns which runs of white space part neighbours on a grid, bool [m].

        On the grid of a fixed pitch the middles of letters are one or more steps apart; where it is
        one, no letter is left out between.

        Args:
          starts: where each run of white space starts, [m].
          stops: where it stops, [m].
        """
        letters = np.flatnonzero(~self._is_space)
        middles = (self.cells[letters, 0] + self.cells[letters, 2]) / 2
        steps = np.diff(middles)
        tops = self.cells[letters, 1]
        bottoms = self.cells[letters, 3]
        is_same_line = (tops[1:] < bottoms[:-1]) & (tops[:-1] < bottoms[1:]) & (steps > 0)
        # Scripts that stand on a grid anyhow have gaps beside Latin letters.
        is_wide = np.array([_is_wide(self.text[i]) for i in letters.tolist()], bool)
        is_same_line &= ~is_wide[1:] & ~is_wide[:-1]
        # [k - 1]: the line of each pair of letters that follow each other in one.
        line = np.cumsum(~is_same_line)
        is_pitch = np.zeros(len(steps), bool)
        order = np.flatnonzero(is_same_line)
        for pairs in np.split(order, np.flatnonzero(np.diff(line[order])) + 1):
            if len(pairs) >= MIN_GRID:
                pitch = np.median(steps[pairs])
                in_pitches = steps[pairs] / pitch
                is_even = np.abs(in_pitches - in_pitches.round()) < GRID_SLACK
                if is_even.mean() > GRID_FRACTION:
                    is_pitch[pairs] = is_even & (in_pitches.round() == 1)
        # Of letters i and i + 1, that before each run of white space.
        return is_pitch[np.searchsorted(letters, starts - 1)]

    def _leave_out(self, characters: list[int]) -> None:
        """Leaves some characters out."""
        kept = np.delete(np.arange(len(self.text)), characters)
        self._indices = kept.tolist()
        self.ink = self.ink[kept]
        self.cells = self.cells[kept]
        self._is_space = self._is_space[kept]
        self.text = "".join(self.text[i] for i in kept.tolist()) if characters else self.text

    def _is_below(self) -> np.ndarray:
        """Returns whether each character but the first, bool [n - 1], stands above or below the
        one before, and is upright: in a column of numbers, pdfium sees no end of a line.

        Of scripts that may be written from top to bottom such characters are a word.
        """
        a = self.cells[:-1]
        b = self.cells[1:]
        overlaps = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        sizes = np.minimum(a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2])
        is_stacked = (overlaps[:, 0] > 0.5 * sizes[:, 0]) & (overlaps[:, 1] < 0.3 * sizes[:, 1])
        is_stacked &= ~self._is_space[1:] & ~self._is_space[:-1]
        found = [i for i in np.flatnonzero(is_stacked).tolist() if not _is_wide(self.text[i])]
        along = self.matrices(found)[:, 0]
        is_below = np.zeros(len(is_stacked), bool)
        is_below[found] = np.abs(along[:, 0]) > np.abs(along[:, 1])
        return is_below

    def matrices(self, indices: list[int]) -> np.ndarray:
        """Returns the directions of some characters in pixels, float64 [n, 2, 2]: along their
        baseline, and from it to the top of the letters."""
        matrices = self._read(_get_matrix, self._own(indices), np.float32, 6, [0]).astype(
            np.float64
        )
        return matrices[:, :4].reshape(-1, 2, 2) @ self._to_pixels[:, :2].T

    def sizes(self, indices: list[int]) -> list[float]:
        """Returns the sizes of the fonts of some characters, in units of their own matrices."""
        return list(map(_get_size, itertools.repeat(self._address), self._own(indices)))

    def baselines(self, indices: list[int]) -> np.ndarray:
        """Returns the y coordinates of the baselines of some characters in pixels, float64 [n]."""
        origins = self._read(_get_origin, self._own(indices), np.float64, 2, [0, 1])
        return origins @ self._to_pixels[1, :2] + self._to_pixels[1, 2]

    def objects(self, indices: list[int]) -> list[int | None]:
        """Returns the addresses of the text objects that draw some characters, None for none."""
        return list(map(_get_object, itertools.repeat(self._address), self._own(indices)))

    def _read(
        self, function, indices: Iterable[int], dtype: type, width: int, columns: list[int]
    ) -> np.ndarray:
        """Returns what a function of pdfium writes for some characters, [n, width] of a dtype.

        Args:
          function: takes the page, a character's index, and the addresses of some columns.
          indices: n characters.
          dtype: of the numbers that it writes.
          width: how many it writes for a character.
          columns: those whose addresses it takes; a column goes with those that follow it.
        """
        indices = list(indices)
        # Zeros stay where pdfium has nothing to say.
        read = np.zeros((len(indices), width), dtype)
        first = read.ctypes.data
        # Without a character `strides` says nothing.
        step = read.itemsize * width
        addresses = (
            range(first + read.itemsize * i, first + read.itemsize * i + read.nbytes, step)
            for i in columns
        )
        calls = map(function, itertools.repeat(self._address), indices, *addresses)
        # The fastest way to run through an iterator.
        collections.deque(calls, maxlen=0)
        return read


def font_name(drawn_by: int) -> str:
    """Returns the name of the font of a text object, by its address."""
    drawn_by = ctypes.cast(drawn_by, pdfium.FPDF_PAGEOBJECT)
    font = pdfium.FPDFTextObj_GetFont(drawn_by)
    name = ctypes.create_string_buffer(MAX_NAME_BYTES)
    pdfium.FPDFFont_GetBaseFontName(font, name, MAX_NAME_BYTES)
    return name.value.decode("utf-8", "replace")


def render_mode(drawn_by: int) -> int:
    """Returns the rendering mode of a text object, by its address."""
    return pdfium.FPDFTextObj_GetTextRenderMode(ctypes.cast(drawn_by, pdfium.FPDF_PAGEOBJECT))


def _is_wide(text: str) -> bool:
    """Whether some characters are as wide as high: Chinese, Japanese or Korean."""
    return any(unicodedata.east_asian_width(character) in ("W", "F") for character in text)


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
