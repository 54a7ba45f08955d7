"""A page as OCR has it, and its words placed on the page's image."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from alignvlm_jax.data import labels
from alignvlm_jax.data.record import Box, Word
from alignvlm_jax.ingest.formats import checks
from alignvlm_jax.ingest.formats.base import Reject

MAX_STRETCH = 0.01
"""Most by which the scales of x and y may differ: sizes are rounded to pixels or tenths of
millimetres, and OCR of a cut or turned page differs by more."""
SOFT_HYPHEN = "\xad"

FRACTIONS = (1.0, 1.0)
"""The size of a page whose boxes are fractions of its sides: its shape is not known."""

Lines = tuple[tuple[Word, ...], ...]


class OcrPage(NamedTuple):
    """A page in the units of its OCR, pixels or others."""

    # width and height, or FRACTIONS; None if the OCR does not say
    size: tuple[float, float] | None
    lines: Lines  # in reading order


def fit(page: OcrPage, width: int, height: int, min_confidence: float) -> Lines:
    """Returns the lines of a page with boxes in pixels of its image.

    Args:
      page: as OCR has it.
      width: of the image in pixels.
      height: of the image in pixels.
      min_confidence: words of less are left out; those without any stay.

    Raises:
      Reject: the page is of another shape than the image, a word lies outside of it, or too many
        words are left out.
    """
    if page.size is None or not (min(page.size) > 0 and math.isfinite(sum(page.size))):
        raise Reject("OCR that does not say how large its page is")
    scales = width / page.size[0], height / page.size[1]
    if page.size != FRACTIONS and abs(scales[0] / scales[1] - 1) > MAX_STRETCH:
        raise Reject(
            f"OCR of a page of another shape ({page.size[0]:g} x {page.size[1]:g}, and the image "
            f"has {width} x {height} pixels)"
        )
    words = [word for line in page.lines for word in line]
    for word in words:
        middle = (word.box[0] + word.box[2]) / 2, (word.box[1] + word.box[3]) / 2
        if not (0 <= middle[0] <= page.size[0] and 0 <= middle[1] <= page.size[1]):
            raise Reject(
                f"OCR with a word outside of its page ({word.text[:20]!r} at "
                f"{[round(side, 1) for side in word.box]}, and the page is {page.size[0]:g} x "
                f"{page.size[1]:g})"
            )
    # Before these words are left out, or nobody could tell how many there were.
    unsure = sum(not _is_sure(word, min_confidence) for word in words)
    checks.check_sure(unsure, len(words), min_confidence)
    bounds = width, height
    lines = []
    for line in page.lines:
        sure = [word for word in line if _is_sure(word, min_confidence)]
        if sure:
            lines.append(tuple(_scaled(word, scales, bounds) for word in sure))
    return tuple(lines)


def _is_sure(word: Word, least: float) -> bool:
    return word.confidence is None or word.confidence >= least


def _scaled(word: Word, scales: tuple[float, float], bounds: tuple[int, int]) -> Word:
    """Returns a word in pixels; what of its box reaches over the border of the page is cut off."""
    left, top, right, bottom = (
        round(min(max(side * scales[i % 2], 0.0), bounds[i % 2]), 2)
        for i, side in enumerate(word.box)
    )
    return Word(word.text, (left, top, right, bottom), None, word.confidence)


def box_of(left: Any, top: Any, right: Any, bottom: Any, text: str) -> Box:
    """Returns the box of what reads `text`; raises Reject if its sides are no numbers, or the wrong
    way round."""
    try:
        box = float(left), float(top), float(right), float(bottom)
    except (TypeError, ValueError) as err:
        raise Reject(f"OCR with a box that is none (of {text[:20]!r}: {err})") from err
    # A side may be "nan" or "inf", which float() reads.
    if not all(map(math.isfinite, box)) or box[0] > box[2] or box[1] > box[3]:
        raise Reject(f"OCR with a box that is none (of {text[:20]!r}: {list(box)})")
    return box


def confidence_of(value: Any, most: float = 1.0) -> float | None:
    """Returns a confidence from 0 to 1, None where the OCR gives none.

    Args:
      value: a number, or its text.
      most: what certainty is written as.

    Raises:
      Reject: it is no number from 0 to `most`.
    """
    if value is None or value == "":
        return None
    try:
        number = float(value) / most
    except (TypeError, ValueError) as err:
        raise Reject(f"OCR with a confidence that is no number ({value!r:.40})") from err
    if not 0 <= number <= 1:
        raise Reject(f"OCR with a confidence that is not from 0 to {most:g} ({value!r:.40})")
    return number


def clean(text: str) -> str:
    """Returns a text as the page shows it: a soft hyphen is seen at the end of a line alone, and
    white space is a space."""
    text = " ".join(text.split())
    shown = f"{text[:-1]}-" if text.endswith(SOFT_HYPHEN) else text
    return shown.replace(SOFT_HYPHEN, "")


def spread(text: str, box: Box, confidence: float | None) -> tuple[Word, ...]:
    """Returns the words of a line of which only the whole is known, as if all its characters were
    equally wide."""
    ends = (box[2], box[0]) if labels.is_from_the_right(text) else (box[0], box[2])
    # White space counts as well, since it takes room on the page.
    edges = np.linspace(*ends, len(text) + 1).tolist()
    words = []
    for found in re.finditer(r"\S+", text):
        left, right = sorted((edges[found.start()], edges[found.end()]))
        words.append(Word(found[0], (left, box[1], right, box[3]), None, confidence))
    return tuple(words)


def without_empty(lines: Iterable[Iterable[Word]]) -> Lines:
    """Returns the lines that have words, and their words that have text."""
    kept = (tuple(word for word in line if word.text) for line in lines)
    return tuple(line for line in kept if line)
