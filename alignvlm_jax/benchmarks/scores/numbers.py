"""Answers that are numbers: relaxed accuracy of ChartQA, and amounts with units and scales
(FinTabNetQA)."""

import re
from collections.abc import Sequence

from alignvlm_jax.benchmarks.scores import denotation

UNITS = re.compile(
    r"\b(dollar|gallons|square feet|shares|mbtu|mbpd|mbbls|mmbtu|unit|gwh|year|mmcf|mile|mboe)s?\b",
    re.IGNORECASE,
)
SCALES = (
    (r" ?\bthousand\b", "e3"),
    (r" ?\bmillion\b", "e6"),
    (r" ?\bbillion\b", "e9"),
    (r" ?%", "e-2"),
)


def amount_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is the amount of one of the answers, with its scale or without:
    "relieved accuracy" of TableVQA-Bench (arXiv 2404.19205).

    Quirks, all kept:
      - $, commas, parentheses and names of units do not matter: "(1,200)" is 1200, not -1200;
      - "3.2 million" equals "3200000", and "3.2" as well, for many tables name their scale in the
        head only: so "3.2 million" equals "3.2%" too;
      - what is no number is compared as a text, normalised as by the denotation accuracy.

    Raises:
      ValueError: `answers` is empty.
    """
    predicted = readings(prediction)
    return max(float(not predicted.isdisjoint(readings(answer))) for answer in answers)


def readings(text: str) -> set[float | str]:
    """Returns the amount with its scale and without; texts where it is none."""
    scaled = UNITS.sub("", re.sub(r"[$(),]", "", denotation.normalize(text)))
    plain = scaled
    for pattern, scale in SCALES:
        scaled = re.sub(pattern, scale, scaled)
        plain = re.sub(pattern, "", plain)
    try:
        return {float(scaled), float(plain)}
    except ValueError:
        return {scaled, plain}


TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is within 5 % of one of the answers, both being numbers, or else
    equals it in all but case (ChartQA, arXiv 2203.10244, as pix2struct's code has it, which others
    copied).

    Quirks, all kept, for they move published numbers:
      - "105" for "100" is right, "105.01" is not; and so is "2019" for "2010": years are numbers
        too;
      - "5%" is 0.05: right for "0.05", wrong for "5";
      - an answer of zero is compared as a string: "0.0" for "0" is wrong;
      - "1,000" and "$10" are no numbers: wrong for "1000" and "10";
      - strings are not stripped, and "yes." for "yes" is wrong.

    Raises:
      ValueError: `answers` is empty.
    """
    return max(float(_is_close(prediction, answer)) for answer in answers)


def _is_close(prediction: str, answer: str) -> bool:
    predicted = _number(prediction)
    wanted = _number(answer)
    if predicted is None or not wanted:
        return prediction.lower() == answer.lower()
    return abs(predicted - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
