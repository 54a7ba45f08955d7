"""What a page says that can be asked: cells of its tables, and the shape of these."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from alignvlm_jax.ingest.formats.pdf.cells import Cell, Cells

MAX_NAME = 40
MAX_ANSWER = 60
"""Most characters of a name in a question, and of an answer from a table."""
YES = "\0yes"
NO = "\0no"
UNANSWERABLE = "\0unanswerable"
"""Answers that are worded in the language of the page."""


class Fact(NamedTuple):
    """Something that a page says.

    Attributes:
      kind: how it is asked, a key of `templates.TEMPLATES`.
      fields: what stands in the question, by the names of the template's fields.
      answer: the answer; or one of YES, NO and UNANSWERABLE.
    """

    kind: str
    fields: tuple[tuple[str, str], ...]
    answer: str


def fact(kind: str, answer: str, **fields: str) -> Fact:
    return Fact(kind, tuple(fields.items()), answer)


def facts_of_tables(tables: list[Cells]) -> list[Fact]:
    """Returns what the cells of the tables of a page say, without what two tables answer
    differently."""
    return certain(itertools.chain.from_iterable(map(_facts_of_cells, tables)))


def certain(facts: Iterable[Fact]) -> list[Fact]:
    """Returns facts without those that answer the same question differently."""
    answers = defaultdict(set)
    for found in facts:
        # Dictionaries keep the order in which questions came.
        answers[found.kind, found.fields].add(found.answer)
    return [Fact(*key, *found) for key, found in answers.items() if len(found) == 1]


def questioned(facts: list[Fact], rng: random.Random) -> Iterator[Fact]:
    """Yields yes/no questions about cells: half of them with the value of another row.

    Args:
      facts: those of cells.
      rng: decides between yes and no.
    """
    # By column: a value of another one would be told by its kind.
    values = defaultdict(list)
    for found in facts:
        if found.kind == "cell":
            fields = dict(found.fields)
            values[fields["name"], fields["column"]].append((fields["key"], found.answer))
    for (_, column), rows in values.items():
        for key, value in rows:
            others = sorted({other for _, other in rows} - {value})
            # Texts that hold each other may both be right.
            others = [other for other in others if other not in value and value not in other]
            # Where all rows agree no other value is at hand.
            if others and rng.random() < 0.5:
                yield fact("is_cell", NO, column=column, key=key, value=rng.choice(others))
            else:
                yield fact("is_cell", YES, column=column, key=key, value=value)


def counted(tables: list[tuple[Cells, bool]]) -> Iterator[Fact]:
    """Yields the numbers of rows and columns, if a page has one table.

    Args:
      tables: the tables of the page, and whether each is surely whole, and does not go on from
        page to page.
    """
    if len(tables) == 1:
        # Of several tables a question would have to say which.
        [(cells, is_whole)] = tables
        yield fact("num_columns", str(len(cells.body[0])))
        if is_whole and cells.head:
            yield fact("num_rows", str(len(cells.body)))


def _facts_of_cells(cells: Cells) -> Iterator[Fact]:
    """Yields the cells of a table, each named by its column's head and its row.

    Rows are named by the first column whose cells are all different. Answers of more than
    MAX_ANSWER characters are left out, and so is all that is not certain.
    """
    key = next((i for i in range(len(cells.body[0])) if _names_rows(cells.body, i)), None)
    if key is None:
        return
    if cells.head is None:
        # Without a head the place alone tells what is meant.
        for row in cells.body if len(cells.body[0]) == 2 else ():
            if key == 0 and _is_answer(row[1]):
                yield fact("beside", row[1].text, key=row[0].text)
        return
    # Two heads alike, or one that is missing, name no column.
    names = [_name(cell) for cell in cells.head]
    if len(set(names)) < len(names) or not all(map(is_name, cells.head)):
        return
    for row in cells.body:
        for column, cell in enumerate(row):
            if column != key and _is_answer(cell):
                fields = {"name": names[key], "key": row[key].text, "column": names[column]}
                yield fact("cell", cell.text, **fields)


def _names_rows(rows: list[list[Cell]], column: int) -> bool:
    """Whether a column has a name in each row, and no name twice."""
    texts = {row[column].text for row in rows}
    return len(texts) == len(rows) and all(is_name(row[column]) for row in rows)


def _name(cell: Cell) -> str:
    """Returns the text of a head as part of a sentence."""
    return cell.text.rstrip("?:？： ")


def is_name(cell: Cell) -> bool:
    """Whether the text of a cell can name a row or column in a question."""
    return 0 < len(cell.text) <= MAX_NAME and cell.is_certain and any(map(str.isalnum, cell.text))


def _is_answer(cell: Cell) -> bool:
    # Signs alone, as ditto marks, say what another cell does.
    return len(cell.text) <= MAX_ANSWER and cell.is_certain and any(map(str.isalnum, cell.text))
