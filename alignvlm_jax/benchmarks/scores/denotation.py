"""Denotation accuracy of WikiTableQuestions, which compares answers as sets of values.

Source: the official evaluator of Pasupat and Liang 2015 (arXiv 1508.00305).
"""

import contextlib
import dataclasses
import math
import re
import unicodedata
from collections.abc import Sequence

SEPARATOR = "|"
"""Separator of the values of an answer that has several."""

NEARLY = 1e-6  # two numbers that differ by less are equal
Date = tuple[int, int, int]

QUOTES = (("[‘’´`]", "'"), ("[“”]", '"'), ("[‐‑‒–—−]", "-"))
# Of the two alternatives in brackets only one can match at a place. In the official program both
# can, and a regular expression has 2 ** n readings of "[1][1]..." to try.
CITATIONS = re.compile(r"((?<!^)\[[^\]]*\]|^\[\d+\]|[•♦†‡*#+])*$")
# " (2nd)" behind a value; what stands in parentheses from the start is the value.
DETAILS = re.compile(r"(?<!^)( \([^)]*\))*$")
# Quotes around the whole, and none within.
QUOTED = re.compile(r'^"([^"]*)"$')


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of an answer.

    Attributes:
      text: its normalised text.
      number: the number that it is, or None.
      date: the (year, month, day) that it is, with -1 for an unknown one ("xx"), or None.
    """

    text: str
    number: float | None = None
    date: Date | None = None

    def matches(self, other: "Value") -> bool:
        """Whether two values have the same text, number or date."""
        if self.text == other.text:
            return True
        # Two numbers are never compared as dates: a value has one or the other.
        if self.number is not None and other.number is not None:
            return abs(self.number - other.number) < NEARLY
        return self.date is not None and self.date == other.date


def denotation_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the values of a prediction match those of one of the answers, else 0.0.

    They match if both have the same number of values and each value of the answer has an equal one
    in the prediction, by the rules of the official evaluator of WikiTableQuestions (Pasupat and
    Liang 2015). Values are separated by "|".

    Quirks of the evaluator, all kept:
      - texts lose accents, citations ("[3]", "†"), details in parentheses and a period at the end;
      - "1,000" is a text: wrong for "1000"; "1e3" and "1000.0000001" are right, "999.9999999" is
        cut to 999;
      - dates are numbers "2004-xx-01", months in words are texts; "2004-xx-xx" is the number 2004;
      - values that are the same count once, and their order does not matter.
    The official program is also given the values that CoreNLP read from the table's cells, which
    can make "march 2004" the same as "2004-03-xx". They are no part of an answer here.

    Raises:
      ValueError: `answers` is empty.
    """
    predicted = values_of(prediction)
    return max(float(_is_match(values_of(answer), predicted)) for answer in answers)


def values_of(text: str) -> list[Value]:
    """Returns the values of an answer without repetitions, in its order."""
    # The key is what makes values the same: 2.0 and "2" are, whatever their texts.
    values: dict[float | Date | str, Value] = {}
    for value in map(parse, text.split(SEPARATOR)):
        key = value.date or (value.text if value.number is None else value.number)
        values.setdefault(key, value)
    return list(values.values())


def parse(text: str) -> Value:
    """Returns the value that a text stands for."""
    normal = normalize(text)
    number = _number(text)
    date = _date(text)
    # A year alone is a number, so that "2004-xx-xx" equals "2004".
    if date is not None and date[1:] == (-1, -1):
        number = date[0]
        date = None
    return Value(normal, number, date)


def normalize(text: str) -> str:
    """Returns a text in lower case with plain letters, quotes and dashes.

    What follows a value in a table of Wikipedia is removed: citations, details in parentheses,
    and quotes around the whole.
    """
    # NFKD splits an accented letter into letter and mark (category Mn), and the mark is dropped.
    text = "".join(
        c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn"
    )
    for pattern, plain in QUOTES:
        text = re.sub(pattern, plain, text)
    # Until nothing changes: removing a citation may uncover details in front of it, and so on.
    before = None
    while text != before:
        before = text
        text = DETAILS.sub("", CITATIONS.sub("", text.strip()).strip())
        text = QUOTED.sub(r"\1", text.strip())
    return " ".join(text.removesuffix(".").split()).lower()


def _is_match(wanted: Sequence[Value], predicted: Sequence[Value]) -> bool:
    """Whether every wanted value is predicted, and no other."""
    return len(wanted) == len(predicted) and all(
        any(map(value.matches, predicted)) for value in wanted
    )


def _number(text: str) -> float | None:
    """Returns the finite number that a text spells, as an int if it is whole; else None."""
    try:
        number = float(text)
        if not math.isfinite(number):
            return None
        with contextlib.suppress(ValueError):
            return int(text)  # float would round long ones
        # int cuts, where one would expect round: "999.9999999" is 999 in the official program.
        return int(number) if abs(number - round(number)) < NEARLY else number
    except ValueError:
        return None


def _date(text: str) -> Date | None:
    """Returns the date that a text like "2004-01-xx" spells, with -1 for "xx"; else None."""
    parts = text.lower().split("-")
    unknown = (("xx", "xxxx"), ("xx",), ("xx",))
    try:
        year, month, day = (
            -1 if part in of else int(part) for part, of in zip(parts, unknown, strict=True)
        )
    except ValueError:
        return None
    is_date = (
        (month == -1 or 1 <= month <= 12)
        and (day == -1 or 1 <= day <= 31)
        and (year, month, day) != (-1, -1, -1)
    )
    return (year, month, day) if is_date else None
