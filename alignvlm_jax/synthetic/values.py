"""Values of forms and receipts, drawn from a seeded generator and split between training and
evaluation by a hash.

Every kind must be unguessable: the best constant answer scores little by ANLS, which a test checks.
So dates are short (separators and centuries would be free points for a guesser), and numbers have
at least four digits.
"""

import hashlib
from collections.abc import Callable

import numpy as np

EVALUATION_FRACTION = 0.15
# Without I and O, which look like 1 and 0.
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Syllables of made-up names. Entries that are listed more than once are drawn more often.
ONSETS = tuple("bcdfghjklmnprstvwz") + (
    "br",
    "ch",
    "cl",
    "dr",
    "fl",
    "gr",
    "pr",
    "sh",
    "sk",
    "st",
    "th",
    "tr",
)
VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ea", "ia", "oo", "ou")
CODAS = ("", "", "", "", "n", "r", "l", "s", "m", "t", "k", "nd", "rt", "x")


def is_evaluation(value: str) -> bool:
    """Whether a value belongs to the evaluation side of the split.

    The hash has no seed, so that the split is the same for every data set.
    """
    digest = hashlib.blake2b(value.casefold().encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") < EVALUATION_FRACTION * 2**32


def is_allowed(value: str, evaluation: bool) -> bool:
    """Whether a question on an evaluation page, or on a training page, may be about `value`.

    On a training page no single word of the value may belong to evaluation, either.
    """
    if evaluation:
        return is_evaluation(value)
    return not any(is_evaluation(part) for part in {value, *value.split()})


def draw(kind: str, rng: np.random.Generator, evaluation: bool) -> str:
    """Returns a random value of a kind in `KINDS`, from the evaluation or the training side of the
    split."""
    # Rejection: about 1 in 7 values is an evaluation value.
    while not is_allowed(value := KINDS[kind](rng), evaluation):
        pass
    return value


def money(rng: np.random.Generator, low: int, high: int) -> str:
    """Returns an amount from `low` up to `high`, exclusive, with two decimals."""
    return f"{int(rng.integers(100 * low, 100 * high)) / 100:.2f}"


def _digits(rng: np.random.Generator, count: int) -> str:
    # From 100 to 999 for 3 digits: none begins with a zero.
    return str(int(rng.integers(10 ** (count - 1), 10**count)))


def _letters(rng: np.random.Generator, count: int) -> str:
    return "".join(LETTERS[i] for i in rng.integers(0, len(LETTERS), count))


def _date(rng: np.random.Generator) -> str:
    # Every month has the days 1 to 28.
    return f"{rng.integers(1, 29):02d}{MONTHS[rng.integers(12)]}{rng.integers(10, 100)}"


def _name(rng: np.random.Generator) -> str:
    parts = [
        ONSETS[rng.integers(len(ONSETS))] + VOWELS[rng.integers(len(VOWELS))]
        for _ in range(rng.integers(2, 4))
    ]
    return ("".join(parts) + CODAS[rng.integers(len(CODAS))]).capitalize()


def _serial(rng: np.random.Generator) -> str:
    return "".join("0123456789ABCDEF"[i] for i in rng.integers(0, 16, 6))


KINDS: dict[str, Callable[[np.random.Generator], str]] = {
    "Invoice": lambda rng: _digits(rng, 5),
    "Order": lambda rng: _digits(rng, 6),
    "Account": lambda rng: _digits(rng, 7),
    "Phone": lambda rng: f"{_digits(rng, 3)}-{_digits(rng, 4)}",
    "Total": lambda rng: money(rng, 100, 1000),
    "Tax": lambda rng: money(rng, 10, 100),
    "Balance": lambda rng: money(rng, 1000, 10000),
    "Date": _date,
    "Due": _date,
    "Name": _name,
    "Agent": _name,
    "City": _name,
    "Code": lambda rng: _letters(rng, 2) + _digits(rng, 3),
    "Ref": lambda rng: f"{_letters(rng, 1)}-{_digits(rng, 4)}",
    "Plate": lambda rng: _digits(rng, 3) + _letters(rng, 3),
    "Serial": _serial,
}
