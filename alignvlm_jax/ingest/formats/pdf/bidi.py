"""The order of the words of a line, for scripts of both directions."""

import itertools
import unicodedata

from alignvlm_jax.data.labels import is_from_the_right
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord

Line = list[PlacedWord]


def in_order(line: Line) -> Line:
    """Returns a line's words as they are read, by where they stand.

    Lines that run up or down the page keep the order of the content. In lines with words from right
    to left, those of the other direction, and numbers, keep theirs among themselves.
    """
    if any(placed.is_vertical for placed in line):
        return line
    ordered = sorted(line, key=lambda placed: placed.word.box[0])
    # Nearly all lines, at once.
    if all(placed.word.text.isascii() for placed in ordered):
        return ordered
    kinds = [_direction(placed.word.text) for placed in ordered]
    if "R" not in kinds:
        return ordered
    # The direction of the line is that of most of its words.
    is_right = kinds.count("R") >= kinds.count("L")
    runs = _runs(ordered, kinds, is_right)
    # Runs from right to left stand in the order of the page, and so do the words in a run of the
    # line's other direction.
    turned = [run if is_ltr else run[::-1] for is_ltr, run in runs]
    return [placed for run in (turned[::-1] if is_right else turned) for placed in run]


def _direction(text: str) -> str:
    """Returns L or R for a word of letters from left or right, N for a number, else O."""
    if is_from_the_right(text):
        return "R"
    kinds = {unicodedata.bidirectional(character) for character in text}
    if kinds & {"R", "AL"}:
        return "R"
    if "L" in kinds:
        return "L"
    return "N" if kinds & {"EN", "AN"} else "O"


def _runs(line: Line, kinds: list[str], is_right: bool) -> list[tuple[bool, Line]]:
    """Returns the runs of a line, from left to right, and whether each is read that way."""
    # Signs go with the line's direction, unless they stand within the other one.
    base = "R" if is_right else "L"
    resolved = list(kinds)
    for i, kind in enumerate(kinds):
        if kind == "O":
            around = {*kinds[max(i - 1, 0) : i], *kinds[i + 1 : i + 2]} - {"O"}
            other = "L" if is_right else "R"
            resolved[i] = other if around == {other} and 0 < i < len(kinds) - 1 else base
    pairs = zip((kind != "R" for kind in resolved), line, strict=True)
    return [
        (is_ltr, [placed for _, placed in run])
        for is_ltr, run in itertools.groupby(pairs, lambda pair: pair[0])
    ]
