"""FinTabNetQA of TableVQA-Bench: amounts with units and scales."""

import re
from collections.abc import Sequence

from alignvlm_jax.eval.scores import denotation

UNITS = re.compile(
    r"\b(dollar|gallons|square feet|shares|mbtu|mbpd|mbbls|mmbtu|unit|gwh|year|mmcf|mile|mboe)s?\b", re.IGNORECASE
)
SCALES = ((r" ?\bthousand\b", "e3"), (r" ?\bmillion\b", "e6"), (r" ?\bbillion\b", "e9"), (r" ?%", "e-2"))


def amount_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction is the amount of one of the answers, with its scale or without: "relieved accuracy" of
    TableVQA-Bench (arXiv 2404.19205).

    Quirks, all kept:
      - $, commas, parentheses and names of units do not matter: "(1,200)" is 1200, not -1200;
      - "3.2 million" equals "3200000", and "3.2" as well, for many tables name their scale in the head only: so
        "3.2 million" equals "3.2%" too;
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
        scaled, plain = re.sub(pattern, scale, scaled), re.sub(pattern, "", plain)
    try:
        return {float(scaled), float(plain)}
    except ValueError:
        return {scaled, plain}
