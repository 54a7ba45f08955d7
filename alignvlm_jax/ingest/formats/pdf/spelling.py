"""What a person reads where a PDF draws the characters of a word."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence

from alignvlm_jax.data.record import Box

MIN_INK = 0.1
"""Smallest area of a visible glyph, in square pixels.

For characters that they cannot draw, as control characters, fonts have a glyph of a hundredth.
"""
# What pdfium makes of a hyphen at the end of a line, and what other programs write for one.
HYPHENS = "\x02\xad\ufffe"
# An accent without a letter stands for the sign itself: TeX draws a backquote this way.
LONE_ACCENTS = {"\u0300": "`", "\u0301": "´", "\u0302": "^", "\u0303": "~", "\u0308": "¨"}
# Accents that TeX draws before their letters, and on them.
DRAWN_ACCENTS = dict(
    zip("¨´ˆ˜ˇ˘˚¸¯˙", "\u0308\u0301\u0302\u0303\u030c\u0306\u030a\u0327\u0304\u0307", strict=True)
)
ARABIC_FORMS = re.compile("[\ufb50-\ufdff\ufe70-\ufefc]")
"""Letters by how they are joined to others, which text does not say."""

Glyph = tuple[str, float, float]
"""The characters that a glyph shows, and where its cell starts and stops."""


def is_plain(word: str) -> bool:
    """Whether each character of a word is a glyph and means itself, as in nearly all words, and is
    read from left to right."""
    if word.isascii():
        return word.isprintable()
    return (
        word.isprintable()
        and "\ufffd" not in word
        and not any(map(unicodedata.combining, word))
        and DRAWN_ACCENTS.keys().isdisjoint(word)
        and not any(map(is_from_the_right, word))
        and unicodedata.is_normalized("NFC", word)
    )


def read_glyphs(
    word: str, inks: Sequence[Box], cells: Sequence[Box], is_joined: Sequence[bool]
) -> list[Glyph] | None:
    """Returns the glyphs of a word in reading order; None if the PDF does not spell one of them.

    Args:
      word: n characters.
      inks: n boxes around what is drawn.
      cells: n boxes around the characters' cells.
      is_joined: whether each character has the cell of the one before; pdfium spells a ligature as
        several characters.
    """
    glyphs: list[list] = []
    parts = zip(word, inks, cells, is_joined, strict=True)
    for i, (character, (left, top, right, bottom), cell, joined) in enumerate(parts):
        seen = _seen(character, (right - left) * (bottom - top) > MIN_INK)
        if seen is None:
            return None
        is_same_glyph = i > 0 and joined
        if glyphs and seen and (is_same_glyph or unicodedata.combining(seen[0])):
            glyphs[-1][0] += seen
        elif seen:
            glyphs.append([LONE_ACCENTS.get(seen, seen), cell[0], cell[2]])
    # Normalised glyph by glyph: over the whole word the number of characters could change, and
    # edges would not fit.
    return _turned([(_normal(text), *cell) for text, *cell in _accented(glyphs)])


def is_from_the_right(character: str) -> bool:
    """Whether a character is a letter of a script that is written from right to left."""
    return unicodedata.bidirectional(character) in ("R", "AL")


def _accented(glyphs: list[list]) -> list[list]:
    """Returns glyphs with accents that are drawn over the next letter joined to it."""
    joined: list[list] = []
    for text, left, right in glyphs:
        accent, start, stop = joined[-1] if joined else ("", 0, 0)
        is_over = (
            accent in DRAWN_ACCENTS and min(stop, right) - max(start, left) > (stop - start) / 2
        )
        if is_over and text.isalpha():
            # Under an accent i and j have no dots.
            letter = {"ı": "i", "ȷ": "j"}.get(text, text)
            joined[-1] = [letter + DRAWN_ACCENTS[accent], left, right]
        else:
            joined.append([text, left, right])
    return joined


def _normal(text: str) -> str:
    """Returns text in Unicode NFC, with Arabic letters as themselves."""
    text = ARABIC_FORMS.sub(lambda form: unicodedata.normalize("NFKC", form[0]), text)
    return unicodedata.normalize("NFC", text)


def _turned(glyphs: list[Glyph]) -> list[Glyph]:
    """Returns glyphs in reading order: words from right to left may be stored as they are drawn.

    Browsers write Arabic so. A word is turned round where its glyphs go to the right; numbers and
    letters from left to right within it keep their order among themselves.
    """
    if not any(is_from_the_right(text[0]) for text, _, _ in glyphs):
        return glyphs
    # Most steps, not all: accents and joined letters may step back.
    steps = [b[1] > a[1] for a, b in itertools.pairwise(glyphs)]
    if 2 * sum(steps) <= len(steps):
        return glyphs
    kinds = [unicodedata.bidirectional(text[0]) for text, _, _ in glyphs]
    is_left = [_is_from_the_left(kinds, i) for i in range(len(kinds))]
    pairs = zip(reversed(is_left), reversed(glyphs), strict=True)
    runs = itertools.groupby(pairs, lambda pair: pair[0])
    turned = [[glyph for _, glyph in run][:: -1 if left else 1] for left, run in runs]
    return [glyph for run in turned for glyph in run]


def _is_from_the_left(kinds: list[str], index: int) -> bool:
    """Whether a glyph is read from left to right also in Arabic: Latin letters, digits, and what
    stands between two digits."""
    if kinds[index] in ("ES", "CS"):
        return all(kind in ("EN", "AN") for kind in (*kinds[:index][-1:], *kinds[index + 1 :][:1]))
    return kinds[index] in ("L", "EN", "AN")


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
