"""Denotation accuracy of WikiTableQuestions: answers as sets of values."""

import contextlib
import dataclasses
import math
import re
import unicodedata
from collections.abc import Sequence

SEPARATOR = "|"
"""Parts the values of an answer that has several."""

NEARLY = 1e-6
Date = tuple[int, int, int]

QUOTES = (("[‘’´`]", "'"), ("[“”]", '"'), ("[‐‑‒–—−]", "-"))
# Where both marks in brackets could match, as in the official program, "[1][1]..." has 2 ** n
# readings to try.
CITATIONS = re.compile(r"((?<!^)\[[^\]]*\]|^\[\d+\]|[•♦†‡*#+])*$")
DETAILS = re.compile(r"(?<!^)( \([^)]*\))*$")
QUOTED = re.compile(r'^"([^"]*)"$')


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of an answer: always a normalised text, and a number or a date where it is one (-1
    for "xx")."""

    text: str
    number: float | None = None
    date: Date | None = None

    def matches(self, other: "Value") -> bool:
        """Whether the texts, the numbers or the dates are the same."""
        if self.text == other.text:
            return True
        if self.number is not None and other.number is not None:
            return abs(self.number - other.number) < NEARLY
        return self.date is not None and self.date == other.date


def denotation_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where the prediction has as many values as one of the answers, and each of the answer's
    has its match, by the rules of the official evaluator of WikiTableQuestions (Pasupat and Liang
    2015). Values are parted by "|".

    Quirks, all kept:
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
    """Returns the different values of an answer, in its order."""
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
    if date is not None and date[1:] == (-1, -1):
        number = date[0]
        date = None
    return Value(normal, number, date)


def normalize(text: str) -> str:
    """Lower case, plain letters, quotes and dashes, without what follows a value in a table of
    Wikipedia."""
    text = "".join(
        c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn"
    )
    for pattern, plain in QUOTES:
        text = re.sub(pattern, plain, text)
    before = None
    while text != before:
        before = text
        text = DETAILS.sub("", CITATIONS.sub("", text.strip()).strip())
        text = QUOTED.sub(r"\1", text.strip())
    return " ".join(text.removesuffix(".").split()).lower()


def _is_match(wanted: Sequence[Value], predicted: Sequence[Value]) -> bool:
    return len(wanted) == len(predicted) and all(
        any(map(value.matches, predicted)) for value in wanted
    )


def _number(text: str) -> float | None:
    try:
        number = float(text)
        if not math.isfinite(number):
            return None
        with contextlib.suppress(ValueError):
            return int(text)  # float would round long ones
        return int(number) if abs(number - round(number)) < NEARLY else number
    except ValueError:
        return None


def _date(text: str) -> Date | None:
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
