"""Tables in the text of a page, as Markdown or HTML, and which of their cells lie beside which."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import bs4
from bs4.exceptions import ParserRejectedMarkup

MAX_SPAN = 100
"""Most rows or columns of a cell: a model may write any number, and many times."""

Place = tuple[int, int]
"""Row and column of a cell's first corner, from 0."""
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Rows and columns of a step to each side."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell, of as many rows and columns as it spans."""

    text: str
    is_heading: bool
    num_rows: int = 1
    num_columns: int = 1


class BadTable(ValueError):
    """A table whose cells overlap so that one hangs out of it, or HTML that cannot be read."""


class Table:
    """The cells of a table by place, and their neighbours.

    Attributes:
      cells: the cells by place.
    """

    def __init__(self, rows: Iterable[list[Cell]]):
        """`rows` has the cells that begin in each row, from the left; raises BadTable."""
        # In the order of the text, in which a dict keeps them.
        self.cells: dict[Place, Cell] = {}
        # By row and column the place of the cell that covers it; a place without a cell is missing.
        self._covered: list[dict[int, Place]] = []
        # By column the cell that reaches down from above, and how many rows it still has.
        reaching: dict[int, tuple[Place, int]] = {}
        for cells in rows:
            self._add_row(cells, reaching)
        while reaching:
            self._add_row([], reaching)
        self._width = max((max(row, default=-1) for row in self._covered), default=-1) + 1
        self._beside = {
            (place, side): self._neighbours(place, side) for place in self.cells for side in STEPS
        }

    def beside(self, place: Place, side: str) -> set[Place]:
        """Returns the cells next to a cell: for each of its rows, or columns, the next one that
        there is; `side` is a key of `STEPS`."""
        return self._beside[place, side]

    def _add_row(self, cells: list[Cell], reaching: dict[int, tuple[Place, int]]) -> None:
        """Places the cells of a row in the columns that no cell from above covers."""
        row = len(self._covered)
        covered: dict[int, Place] = {}
        column = 0
        waiting = list(reversed(cells))
        last = max(reaching, default=-1)
        while waiting or column <= last:
            if column in reaching:
                place, left = reaching.pop(column)
                covered[column] = place
                if left > 1:
                    reaching[column] = (place, left - 1)
                column += 1
                continue
            if not waiting:
                column += 1
                continue
            cell = waiting.pop()
            place = (row, column)
            self.cells[place] = cell
            for spanned in range(column, column + cell.num_columns):
                # Where cells overlap, the later one wins.
                covered[spanned] = place
                reaching.pop(spanned, None)
                if cell.num_rows > 1:
                    reaching[spanned] = (place, cell.num_rows - 1)
            column += cell.num_columns
        self._covered.append(covered)

    def _neighbours(self, place: Place, side: str) -> set[Place]:
        """Returns what `beside` does, by walking from each of a cell's outer corners."""
        cell = self.cells[place]
        (top, left) = place
        (down, across) = STEPS[side]
        bottom = top + cell.num_rows - 1
        right = left + cell.num_columns - 1
        if across:
            columns = range(right + 1, self._width) if across > 0 else range(left - 1, -1, -1)
            # Each generator is used up before `row` is the next: a wide table is not listed whole.
            found = {
                self._first(((row, column) for column in columns), place)
                for row in range(top, bottom + 1)
            }
        else:
            rows = range(bottom + 1, len(self._covered)) if down > 0 else range(top - 1, -1, -1)
            found = {
                self._first(((row, column) for row in rows), place)
                for column in range(left, right + 1)
            }
        return found - {None}

    def _first(self, line: Iterable[Place], place: Place) -> Place | None:
        """Returns the first cell on a line that is not the one at `place`."""
        for row, column in line:
            if row >= len(self._covered):
                raise BadTable(f"the cell at {place} reaches below the last row")
            found = self._covered[row].get(column)
            if found is not None and found != place:
                return found
        return None

    def headings(self, place: Place, side: str) -> set[Place]:
        """Returns the headings of a cell on a side: the heads among all cells on the way to the
        border, or where there are none those at the border; never the cell itself."""
        # Overlapping cells may stand on each other's left: each is visited once.
        seen = set()
        ends = set()
        waiting = {place}
        while waiting:
            here = waiting.pop()
            seen.add(here)
            further = self.beside(here, side)
            waiting |= further - seen
            if not further:
                ends.add(here)
        heads = {one for one in seen if self.cells[one].is_heading}
        return heads - {place} or ends - {place}


@functools.lru_cache(maxsize=4)
def tables_of(text: str, with_markdown: bool = True) -> tuple[Table, ...]:
    """Returns the tables of a text: those in Markdown, if asked for, before those in HTML.

    Raises:
      BadTable: one of them is.
    """
    found = [*(_markdown_tables(text) if with_markdown else ()), *_html_tables(text)]
    return tuple(table for table in map(Table, found) if table.cells)


def _markdown_tables(text: str) -> Iterator[list[list[Cell]]]:
    """Yields the rows of runs of two or more lines that have a bar; the first row and the first
    column are headings."""
    run: list[str] = []
    # The empty line at the end, which has no bar, ends the last run.
    for line in [*text.strip().split("\n"), ""]:
        if "|" in line:
            run.append(line)
            continue
        if len(run) > 1:
            yield [
                [Cell(cell, is_heading=not (row and column)) for column, cell in enumerate(cells)]
                for row, cells in enumerate(_markdown_rows(run))
            ]
        run = []


def _markdown_rows(lines: list[str]) -> list[list[str]]:
    """Returns the texts of the cells of each line, without the lines that only rule."""
    rules = [_is_rule(line.replace("|", "").strip()) for line in lines]
    first_rule = rules.index(True) if True in rules else -1
    rows = []
    for number, line in enumerate(lines):
        if number == first_rule or not set(line) - set("- :|"):
            continue
        # A bar within a cell, escaped or not, parts it: the reference knows no other.
        cells = [cell.strip() for cell in line.split("|")]
        # Of the bars at both ends; an empty cell beside them stays.
        cells = cells[1:] if not cells[0] else cells
        cells = cells[:-1] if cells and not cells[-1] else cells
        if cells:
            rows.append(cells)
    return rows


def _is_rule(text: str) -> bool:
    # Colons say how a column is aligned.
    return bool(text) and not set(text) - set("- :")


def _html_tables(text: str) -> Iterator[list[list[Cell]]]:
    """Yields the rows of all tables in HTML; the cells of a table within a cell count for both."""
    # Most pages have none, and a parser needs longer than all else.
    if "<table" not in text.lower():
        return
    try:
        tables = bs4.BeautifulSoup(text, "html.parser").find_all("table")
    except ParserRejectedMarkup as err:
        raise BadTable(str(err)) from err
    for table in tables:
        rows = table.find_all("tr")
        yield [
            [
                _html_cell(cell, len(rows) - number, row.find_parent("thead") is not None)
                for cell in row.find_all(["th", "td"], recursive=False)
            ]
            # With rows of tables within its cells, which are other tables as well.
            for number, row in enumerate(rows)
        ]


def _html_cell(cell: bs4.Tag, rows_left: int, is_in_head: bool) -> Cell:
    """Returns a cell of a row from which on the table has `rows_left` rows."""
    for line_break in cell.find_all("br"):
        line_break.replace_with("\n")
    num_rows = cell.get("rowspan")
    # 0 is HTML for all rows that are left.
    is_rest = isinstance(num_rows, str) and num_rows.strip() == "0"
    return Cell(
        cell.get_text(separator="").strip(),
        cell.name == "th" or is_in_head,
        rows_left if is_rest else _span(num_rows),
        _span(cell.get("colspan")),
    )


def _span(value: str | None) -> int:
    """Returns the number of rows or columns that an attribute gives; 1 for what is none."""
    try:
        return min(max(int(value or 1), 1), MAX_SPAN)
    except ValueError:
        return 1
