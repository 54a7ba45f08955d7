"""The indentation of code, as spaces before its lines."""

import itertools

from alignvlm_jax.data.record import Word
from alignvlm_jax.ingest.formats.pdf.bidi import Line
from alignvlm_jax.ingest.formats.pdf.columns import FIXED_PITCH, is_code, pitch
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord

MAX_INDENT = 80
"""Most spaces before a line: what is further in is no code."""
MAX_PITCH = 3
"""Largest distance, in ems, from line to line of a piece of code; it may have an empty line."""


def indented(lines: list[Line]) -> list[Line]:
    """Returns lines, those of code with spaces before their first words.

    A line is indented by its distance from the leftmost one of its piece of code, in characters.
    """
    pieces: list[list[Line]] = []
    for line in lines:
        if pieces and _goes_on(pieces[-1][-1], line):
            pieces[-1].append(line)
        else:
            pieces.append([line])
    return list(itertools.chain.from_iterable(map(_indented_piece, pieces)))


def _indented_piece(lines: list[Line]) -> list[Line]:
    if len(lines) < 2 or not any(map(is_code, lines)):
        return lines
    # The leftmost line is where the code begins, whatever the indentation of the whole piece.
    start = min(line[0].word.box[0] for line in lines)
    return [[_indented_word(line[0], start), *line[1:]] for line in lines]


def _indented_word(placed: PlacedWord, start: float) -> PlacedWord:
    """Returns a word with spaces before it for each character's width from `start`."""
    word = placed.word
    width = (word.box[2] - word.box[0]) / len(word.text)
    num_spaces = round((word.box[0] - start) / width)
    if not 0 < num_spaces <= MAX_INDENT:
        return placed
    # They have no width: the box of a word is where its ink is.
    edges = word.edges and (word.box[0],) * num_spaces + word.edges
    return placed._replace(word=Word(" " * num_spaces + word.text, word.box, edges))


def _goes_on(line: Line, following: Line) -> bool:
    """Whether two lines are of one piece of code."""
    step = following[0].word.box[1] - line[0].word.box[1]
    is_near = 0 < step < MAX_PITCH * line[0].em and abs(line[0].em - following[0].em) < 0.1
    # A line of a bracket alone has the width of the others, too.
    return is_near and pitch(line) > 0 and abs(pitch(line) - pitch(following)) < FIXED_PITCH
