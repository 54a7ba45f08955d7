"""Types of flags: functions from the text of a flag to its value, shared by commands and analyses.

A text that is no such value is an `argparse.ArgumentTypeError`, whose message is one line.
"""

import argparse


def positive(text: str) -> int:
    """Returns a whole number above 0."""
    # Of what is no number int() raises ValueError, and argparse names the flag's type itself.
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def not_negative(text: str) -> int:
    """Returns a whole number from 0 on, as of a seed."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def amount(text: str) -> float:
    """Returns a number above 0, as of a price."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    # Not value <= 0: nan is neither above nor below.
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def positives(text: str) -> list[int]:
    """Returns whole numbers above 0, separated by commas; there may be none."""
    return [positive(part) for part in text.split(",") if part]


def sizes(text: str) -> list[float]:
    """Returns numbers above 0, separated by commas: what is measured beside 0; there may be
    none."""
    try:
        values = [float(part) for part in text.split(",") if part]
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"{text} is not made of numbers with commas between them"
        ) from err
    # Not any(value <= 0): nan is neither above nor below.
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(
            f"{text} has a size that is not above 0 (0 is always measured)"
        )
    return values


def probability(text: str) -> float:
    """Returns a number from 0 to below 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability: from 0 to below 1")
    return float(text)


def names(text: str) -> list[str]:
    """Returns names separated by commas, as `split`."""
    try:
        return split(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def split(text: str) -> list[str]:
    """Returns names separated by commas; raises ValueError for an empty one, as of a variable that
    is not set."""
    found = [name.strip() for name in text.split(",")]
    if "" in found:
        raise ValueError(f"{text!r} has an empty name")
    return found
