"""Filters of rows by the values of columns, as `--filter="image_correspondence_min>=4"`."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from alignvlm_jax.errors import UsageError, UserError, nearest
from alignvlm_jax.ingest.formats.base import Reject

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
EQUALITIES = ("==", "=", "!=")
# Two characters go before one, or ">=" would be read as ">".
CONDITION = re.compile(rf"\s*([^<>=!]+?)\s*({'|'.join(OPERATORS)})\s*([^<>=!]+?)\s*")
NUMBERS = re.compile(r"u?int\d+|halffloat|float|double")
"""Columns of numbers, as pyarrow spells their types."""

TEXTS = re.compile(r"(large_)?string(_view)?|dictionary<.*>|null")


class Condition(NamedTuple):
    """A condition on a column.

    Attributes:
      column: name of the column.
      operator: a key of `OPERATORS`.
      value: what the column is compared with; a number where its text is one.
    """

    column: str
    operator: str
    value: float | str

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:g}"
        return f"{self.column}{self.operator}{value}"

    def holds(self, value: Any) -> bool:
        """Whether the value of a row meets the condition; raises Reject if they do not compare."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(self.value, str) != isinstance(value, str) or not (
            is_number or isinstance(value, str)
        ):
            # NaN, null and other kinds are neither above nor below: a guess would be silent.
            raise Reject(f"the filter {self} cannot compare a {type(value).__name__}")
        if is_number and math.isnan(value):
            raise Reject(f"the filter {self} cannot compare NaN")
        return OPERATORS[self.operator](value, self.value)


def parse(text: str) -> tuple[Condition, ...]:
    """Returns the conditions of a filter, COLUMN OP VALUE joined by commas; none for "".

    Raises:
      UsageError: a part is no condition.
    """
    return tuple(_condition(part) for part in text.split(",")) if text.strip() else ()


def _condition(part: str) -> Condition:
    match = CONDITION.fullmatch(part)
    if not match:
        raise UsageError(
            f"--filter has {part.strip()!r}, which is no COLUMN OP VALUE as "
            f"image_correspondence_min>=4; OP is one of {' '.join(OPERATORS)}"
        )
    column, operation, text = match.groups()
    # What is a number is compared as one: "10" comes before "9" as a text.
    try:
        value = float(text)
    except ValueError:
        value = text.strip("'\"")
    is_text = isinstance(value, str)
    if (is_text and operation not in EQUALITIES) or (not is_text and not math.isfinite(value)):
        raise UsageError(f"--filter compares {column!r} by {operation} with {text!r}, no number")
    return Condition(column, operation, value)


def check(conditions: Iterable[Condition], types: Mapping[str, str], path: str) -> None:
    """Raises UserError for a column that a file does not have, or that is not comparable.

    Args:
      conditions: the filter.
      types: type of each column of the file, as pyarrow spells it.
      path: the file, for the message.
    """
    # Here, where the schema is known: else every row of a long set would be rejected for it.
    for condition in conditions:
        if condition.column not in types:
            raise UserError(
                f"--filter: {path} has no column {condition.column!r}"
                f"{nearest(condition.column, types)}"
            )
        kind = types[condition.column]
        if not NUMBERS.fullmatch(kind) and not TEXTS.fullmatch(kind):
            # Of a rating a turn, FineVision has the least beside it.
            scalars = [name for name, other in types.items() if NUMBERS.fullmatch(other)]
            raise UserError(
                f"--filter: column {condition.column!r} of {path} is {kind}, neither a number nor "
                f"a text{nearest(condition.column, scalars)}"
            )


def reason_against(conditions: Iterable[Condition], values: Mapping[str, Any]) -> str:
    """Returns why a row is left out, "" if it meets all conditions.

    Raises:
      Reject: a value does not compare.
    """
    for condition in conditions:
        value = values[condition.column]
        if not condition.holds(value):
            return f"left out by --filter={condition} ({value})"
    return ""
