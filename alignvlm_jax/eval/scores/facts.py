"""TabFact: whether a statement about a table is true."""

import re
from collections.abc import Sequence

TRUE, FALSE = {"true", "yes", "entailed", "1"}, {"false", "no", "refuted", "0"}


def fact_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction says of a statement what one of the answers says: data sets write true, yes or 1.

    Quirks: words around the verdict do not matter (DUE compares strings: "Yes." for "yes" is wrong there), and who says
    both, or neither, is wrong. TableVQA-Bench looks for the letters "true" and "false" instead: in "untrue" as well.

    Raises:
      ValueError: `answers` is empty.
    """
    said = verdict(prediction)
    return max(float(said is not None and said == verdict(answer)) for answer in answers)


def verdict(text: str) -> bool | None:
    """Returns what a text says of a statement, None where that is not clear."""
    words = set(re.findall(r"\w+", text.lower()))
    is_true, is_false = bool(words & TRUE), bool(words & FALSE)
    return is_true if is_true != is_false else None
