"""Contents of synthetic documents before layout: forms, receipts and real tables, with questions
and answers."""

import dataclasses
import itertools

import numpy as np

from alignvlm_jax.data.record import Turn
from alignvlm_jax.synthetic import values
from alignvlm_jax.synthetic.pages import Lines

_ITEM_NAMES = """
Milk Bread Eggs Rice Beans Soap Tea Salt Flour Sugar Honey Apples Pears Plums Cheese Butter Coffee
Juice Pasta Fish Nuts Oats Leeks Onions Towel Brush Lamp Cable Paint Nails Rope Glue Pens Paper
Chalk Socks Belt Scarf Boots Gloves
"""
ITEMS = tuple(_ITEM_NAMES.split())


@dataclasses.dataclass(frozen=True)
class Table:
    """A real table: each of `rows` is a unique key and then values, under `header`."""

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Content:
    """The text of a document before layout, and the questions on it with their answers."""

    kind: str
    lines: Lines
    turns: tuple[Turn, ...]


def form(rng: np.random.Generator, evaluation: bool, num_lines: int) -> Content:
    """Returns a form: lines of a field's name and its value, each of another kind.

    Args:
      rng: generator of all random choices.
      evaluation: whether values are of the evaluation side of the split (`values`).
      num_lines: lines of the document.
    """
    # Each kind at most once, or a question would have two answers.
    kinds = rng.permutation(list(values.KINDS))[:num_lines]
    lines = tuple((str(kind), values.draw(kind, rng, evaluation)) for kind in kinds)
    turns = tuple(Turn(f"What is the {kind.lower()}?", (value,)) for kind, value in lines)
    return Content("form", lines, turns)


def receipt(rng: np.random.Generator, evaluation: bool, num_lines: int) -> Content:
    """Returns a receipt: priced items under a shop's name, above their sum. Arguments as `form`.

    A receipt of three lines has either the name or the sum; one of two lines has the name alone.
    """
    has_total = num_lines == 4 or (num_lines == 3 and rng.random() < 0.5)
    has_shop = num_lines == 4 or not has_total
    items = [str(item) for item in rng.permutation(ITEMS)[: num_lines - has_total - has_shop]]
    # The sum follows from the prices, so all amounts are drawn again until each is on the right
    # side of the split.
    while True:
        cents = [int(c) for c in rng.integers(1000, 10000, len(items))]
        amounts = [f"{c / 100:.2f}" for c in (*cents, sum(cents))]
        if all(values.is_allowed(amount, evaluation) for amount in amounts):
            break
    *prices, total = amounts
    lines = list(zip(items, prices, strict=True))
    turns = [Turn(f"How much is the {item.lower()}?", (price,)) for item, price in lines]
    if has_shop:
        shop = values.draw("Name", rng, evaluation)
        lines = [(shop,), *lines]
        turns = [Turn("What is the shop?", (shop,)), *turns]
    if has_total:
        lines = [*lines, ("Total", total)]
        turns = [*turns, Turn("What is the total?", (total,))]
    return Content("receipt", tuple(lines), tuple(turns))


def table(
    rng: np.random.Generator, evaluation: bool, num_lines: int, tables: tuple[Table, ...]
) -> Content:
    """Returns a header and rows of one of `tables`. Other arguments as `form`.

    In evaluation every row has an evaluation value, and questions are about evaluation values
    alone.
    """
    # Tables are drawn by the square root of their size, so that the largest does not crowd out the
    # others.
    weights = np.array([len(table.rows) ** 0.5 for table in tables])
    rows: list[tuple[str, ...]] = []
    # A small table may have too few rows on this side of the split: then another is drawn.
    while len(rows) < num_lines - 1:
        source = tables[rng.choice(len(tables), p=weights / weights.sum())]
        num_values = min(int(rng.integers(1, 3)), len(source.header) - 1)
        # Column 0 is the key, which questions name.
        columns = [0, *sorted(1 + rng.permutation(len(source.header) - 1)[:num_values])]
        shuffled = (source.rows[index] for index in rng.permutation(len(source.rows)))
        chosen = (tuple(row[column] for column in columns) for row in shuffled)
        rows = list(
            itertools.islice((row for row in chosen if _may_show(row, evaluation)), num_lines - 1)
        )
    header = tuple(source.header[column] for column in columns)
    turns = tuple(
        Turn(f"What is the {column} of {row[0]}?", (cell,))
        for row in rows
        for column, cell in zip(header[1:], row[1:], strict=True)
        if values.is_allowed(cell, evaluation)
    )
    return Content("table", (header, *rows), turns)


def _may_show(row: tuple[str, ...], evaluation: bool) -> bool:
    """Whether a document may show a row: in evaluation, a row with a value that a question may be
    about; in training, a row without any evaluation value, also as its key."""
    allowed = [values.is_allowed(cell, evaluation) for cell in row]
    return any(allowed[1:]) if evaluation else all(allowed)
