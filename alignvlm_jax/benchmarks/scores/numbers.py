"""Scores of answers that are numbers.

They are the relaxed accuracy of ChartQA, and the relieved accuracy of amounts with units and scales
(FinTabNetQA in TableVQA-Bench).
"""

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
    """Returns 1.0 if a prediction is the amount of one of the answers, else 0.0.

    Amounts count with their scale and without. This is the "relieved accuracy" of TableVQA-Bench
    (arXiv 2404.19205).

    Quirks of the benchmark's code, all kept:
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
    """Returns the two readings of a text, with its scale and without.

    Both are numbers if they can be, else both are texts.
    """
    # A scale becomes an exponent behind the number: "3.2 million" is "3.2e6" for float().
    scaled = UNITS.sub("", re.sub(r"[$(),]", "", denotation.normalize(text)))
    plain = scaled
    # Normalised before, so that the patterns meet lower case and plain dashes alone.
    for pattern, scale in SCALES:
        scaled = re.sub(pattern, scale, scaled)
        plain = re.sub(pattern, "", plain)
    try:
        # "3.2 million" gives 3200000.0 and 3.2, "12" gives 12.0 alone.
        return {float(scaled), float(plain)}
    except ValueError:
        return {scaled, plain}


TOLERANCE = 0.05  # relative to the answer


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if a prediction is close to one of the answers, else 0.0.

    Two numbers are close if they differ by at most 5 % of the answer, other texts if they are equal
    in all but case. This is the relaxed accuracy of ChartQA (arXiv 2203.10244) as pix2struct's code
    has it, which others copied.

    Quirks of that code, all kept because they move published numbers:
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
    """Whether a prediction is close to one answer."""
    predicted = _number(prediction)
    wanted = _number(answer)
    # `not wanted` also holds for 0, by which the difference cannot be divided.
    if predicted is None or not wanted:
        return prediction.lower() == answer.lower()
    return abs(predicted - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    """Returns the number that a text spells, a percentage as a fraction; else None."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
