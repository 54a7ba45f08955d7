import re

import pytest

from alignvlm_jax.ingest.formats.pdf.cells import Cell, Cells
from alignvlm_jax.ingest.formats.pdf.facts import facts_of_tables
from alignvlm_jax.ingest.formats.pdf.templates import TEMPLATES
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.make_pdf import rule, table, text
from tests.ingest.formats.pdf.read_pdf import texts

FRUIT = [
    ["name", "size", "colour"],
    ["apple", "12 cm", "red"],
    ["pear", "9 cm", ""],
    ["plum", "4 cm", "a very deep\nand dark blue"],
]
ASKED = {
    ("apple", "size"): "12 cm",
    ("apple", "colour"): "red",
    ("pear", "size"): "9 cm",
    ("plum", "size"): "4 cm",
    ("plum", "colour"): "a very deep and dark blue",
}
FORMS = [
    re.compile(re.sub(r"\\{(name|key|column)\\}", r"(?P<\1>.*?)", re.escape(template)))
    for template in TEMPLATES["cell"]["en"]
]


def asked(record):
    """The answers by the row and column that are asked about."""
    found = {}
    for turn in record.turns:
        match = next(match for form in FORMS if (match := form.fullmatch(turn.question)))
        [found[match["key"], match["column"]]] = turn.answers
    return found


def cell_texts():
    return "".join(
        text(24 + 80 * column, 169 - 20 * row - 9 * line, output, 8, font="F1" if row else "F2")
        for row, cells in enumerate(FRUIT)
        for column, cell in enumerate(cells)
        for line, output in enumerate(cell.split("\n"))
    )


GRID = [(20 + 80 * column, 160 - 20 * row) for row in range(4) for column in range(3)]
RULES = {
    "cell by cell": table(20, 180, [80, 80, 80], FRUIT),
    "a frame for each cell": cell_texts() + "".join(f"0.7 G {x} {y} 80 20 re S\n" for x, y in GRID),
    "thin boxes, all in one path": cell_texts()
    + "0.7 g "
    + "".join(f"20 {180 - 20 * row} 240 0.8 re " for row in range(5))
    + "".join(f"{100 + 80 * column} 100 0.8 80 re " for column in range(2))
    + "f\n",
    "scaled and moved": cell_texts()
    + "q 0.01 0 0 0.02 20 100 cm 20 w 0.7 G "
    + "".join(f"0 {1000 * row} m 24000 {1000 * row} l S " for row in range(5))
    + "".join(f"{8000 * column} 0 m {8000 * column} 4000 l S " for column in (1, 2))
    + "Q\n",
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("dpi", [72, 100, 150])
def test_a_table_is_found_however_its_rules_are_drawn(read, rules, dpi):
    (record,) = read([RULES[rules]], dpi)
    assert asked(record) == ASKED


def test_a_table_in_a_form(read):
    """Content that is used as one object, as programs wrap what they place."""
    (record,) = read([make_pdf.FORM], form=table(40, 280, [160, 160, 160], FRUIT, 40))
    # The lines of the last cell are short here, as if they were two entries.
    assert asked(record) == {key: ASKED[key] for key in ASKED if key != ("plum", "colour")}


def test_a_table_on_a_turned_page(read):
    turned = f"q 0 1 -1 0 300 0 cm {table(20, 180, [80, 80, 80], FRUIT)} Q"
    (record,) = read([turned], page="/Rotate 90", size=(300, 300))
    assert asked(record) == ASKED


def test_a_table_is_read_by_rows_and_what_stands_around_it_in_order(read):
    """The cells are drawn column by column here, and from the last line."""
    by_columns = "".join(
        text(24 + 80 * column, 149 - 20 * row - 9 * line, output, 8, font="F1" if row else "F2")
        for column in range(3)
        for row, cells in enumerate(FRUIT)
        for line, output in reversed(list(enumerate(cells[column].split("\n"))))
    )
    rules = "".join(rule(20, y, 260, y) for y in range(80, 161, 20))
    rules += "".join(rule(x, 80, x, 160) for x in (100, 180))
    (record,) = read([text(20, 180, "before") + by_columns + rules + text(20, 50, "after")])
    assert texts(record) == [
        "before", "name size colour", "apple 12 cm red", "pear 9 cm", "plum 4 cm a very deep", "and dark blue", "after"
    ]  # fmt: skip
    assert asked(record) == ASKED


NO_TABLES = {
    "no columns": "".join(rule(20, y, 260, y) for y in (180, 160, 140, 120, 100)),
    "no rows": "".join(rule(x, 100, x, 180) for x in (20, 100, 180, 260)),
    "a box": "".join(rule(20, y, 260, y) for y in (180, 160, 140))
    + "".join(rule(x, 140, x, 180) for x in (100, 180)),
    "areas": "0.7 g " + "".join(f"{x} {y} 80 20 re f " for x, y in GRID),
    "a drawing": RULES["cell by cell"] + "10 10 m 11 11 l " * 20_000 + "S\n",
    "other columns in every row": "".join(rule(20, y, 260, y) for y in (180, 160, 140, 120, 100))
    + "".join(
        rule(20 + x + 9 * row, 180 - 20 * row, 20 + x + 9 * row, 160 - 20 * row)
        for row in range(4)
        for x in (70, 140)
    ),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_what_is_no_table_is_not_asked_about(read, name):
    (record,) = read([NO_TABLES[name] + "0 g " + cell_texts()])
    assert len(texts(record)) > 3 and record.turns == ()


def test_tables_of_a_page_that_answer_differently_are_not_asked(read):
    other = [["name", "size", "colour"], ["apple", "13 cm", "red"], ["fig", "3 cm", "green"]]
    (record,) = read([table(20, 190, [80, 80, 80], FRUIT) + table(20, 90, [80, 80, 80], other)])
    assert ("apple", "size") not in asked(record)
    assert asked(record)["apple", "colour"] == "red"
    assert asked(record)["fig", "size"] == "3 cm"


HEAD = ["kind", "name", "size"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([HEAD, ["a", "x", "1"], ["a", "y", "2"]], [("name", "x", "kind", "a"), ("name", "x", "size", "1"),
                                                    ("name", "y", "kind", "a"), ("name", "y", "size", "2")]),
        ([HEAD, ["a", "x", "1"], ["a", "x", "1"]], []),  # no column tells the rows apart
        ([HEAD, ["", "x", "1"], ["b", "x", "1"]], []),
        ([["kind", "kind"], ["a", "1"], ["b", "2"]], []),
        ([["kind", ""], ["a", "1"], ["b", "2"]], []),
        ([["ki- nd", "size"], ["a", "1"], ["b", "2"]], []),
        ([["kind", "size"], ["a", "1" * 61], ["b", "bro- ken"], ["c", "1" * 60]], [("kind", "c", "size", "1" * 60)]),
        ([["kind", "size"], ["a" * 41, "1"], ["b", "1"]], []),
    ],
)  # fmt: skip
def test_facts_have_one_answer(rows, expected):
    cells = [[Cell(text, "- " not in text, False) for text in row] for row in rows]
    assert [
        (*dict(fact.fields).values(), fact.answer)
        for fact in facts_of_tables([Cells(cells[0], cells[1:])])
    ] == expected


REGION = [
    ["region", "2023", "2024"],
    ["north", "12", "14"],
    ["south", "9", "11"],
    ["east", "5", "6"],
]
HEADLESS = [["apple", "12 cm", "red"], ["pear", "9 cm", "green"], ["plum", "4 cm", "blue"]]


@pytest.mark.parametrize(
    ("content", "num_asked"),
    [
        (table(20, 180, [80, 80, 80], REGION), 6),
        # Without a head, as where a table goes on from the page before.
        (table(20, 180, [80, 80, 80], HEADLESS, head="F1"), 0),
        # A head that nothing but its kind tells, below text and at the top of a page.
        (text(20, 190, "a", 6) + text(20, 182, "b", 6) + table(20, 175, [80, 80, 80], FRUIT, head="F1"), 5),
        (table(20, 180, [80, 80, 80], FRUIT, head="F1"), 0),
        # A rule more below the head.
        (table(20, 180, [80, 80, 80], HEADLESS, head="F1") + rule(20, 158, 260, 158), 4),
        # Two rows of head.
        (table(20, 180, [80, 80, 80], [["", "sales", ""], *REGION]) + text(24, 152, "x", 6, font="F2"), 0),
        # A rule that ends inside: cells are merged.
        (table(20, 180, [80, 80, 80], REGION) + rule(100, 150, 180, 150), 0),
        (table(20, 180, [80, 80, 80], REGION) + rule(140, 160, 140, 140), 0),
        # A title across all columns is no part of the head, another row of heads is.
        (table(20, 160, [80, 80, 80], REGION) + rule(20, 180, 260, 180), 6),
        (table(20, 160, [80, 80, 80], REGION) + rule(20, 180, 260, 180) + rule(140, 180, 140, 160), 0),
        # Several short lines in a cell may be as many entries; in all cells they are rows.
        (table(20, 180, [80, 80, 80], [REGION[0], ["north", "1\n2", "3\n4"], *REGION[2:]]), 4),
        (table(20, 180, [80, 80, 80], [REGION[0], ["n\nm", "1\n2", "3\n4"], *REGION[2:]]), 0),
        (table(20, 180, [30] * 4, [["k", "u", "v", "w"], ["n\nm", "1\n2", "3\n4", "5\n6"], ["o", "7", "8", "9"], ["p", "7", "8", "9"]]), 0),
        # An index is no part of a number.
        (table(20, 180, [80, 80, 80], REGION) + text(116, 155, "1", 4), 5),
        # What the head says stands in the body once more.
        (table(20, 180, [80, 80, 80], [*REGION, REGION[0]]), 0),
    ],
)  # fmt: skip
def test_heads_are_told_from_bodies_and_doubtful_tables_are_left_out(read, content, num_asked):
    (record,) = read([content])
    assert len(asked(record)) == num_asked


def open_table(rows, head="F2", rules=(184, 168, 100), columns=(20, 120, 200)):
    """A table with rules above, below and under its head alone."""
    content = "".join(rule(20, y, 260, y) for y in rules)
    return content + "".join(
        text(x, 172 - 20 * i, cell, 9, font="F1" if i else head)
        for i, row in enumerate(rows)
        for x, cell in zip(columns, row, strict=True)
    )


OPEN = [["city", "people", "area"], ["Oslo", "709,037", "454"], ["Bergen", "291,940", "465"]]


@pytest.mark.parametrize(
    ("content", "num_asked"),
    [
        (open_table(OPEN), 4),
        (open_table(OPEN, "F1"), 4),
        # A cell of two lines makes a row that is none.
        (open_table([*OPEN[:2], ["", "about", ""], OPEN[2]], rules=(184, 168, 80)), 0),
        # Words across the gap, and a frame around a page.
        (open_table([*OPEN, ["and all the others of the land", "", ""]], rules=(184, 168, 80)), 0),
        (open_table(OPEN, rules=(184, 130, 110)), 0),
        (open_table(OPEN) + rule(110, 184, 110, 120), 0),
    ],
)
def test_a_table_with_few_rules(read, content, num_asked):
    (record,) = read([content])
    assert len(asked(record)) == num_asked


def test_a_head_that_asks_is_quoted_without_its_mark(read):
    rows = [["name", "is it red?", "size:"], *HEADLESS]
    (record,) = read([table(20, 180, [80, 80, 80], rows)])
    assert {column for _, column in asked(record)} == {"is it red", "size"}
    assert not any("??" in turn.question for turn in record.turns)


def test_what_stands_beside_is_asked_where_no_head_is(read):
    rows = [row[:2] for row in HEADLESS]
    (record,) = read([table(20, 180, [80, 80], rows, head="F1")])
    assert [turn.answers for turn in record.turns] == [("12 cm",), ("9 cm",), ("4 cm",)]
    assert all("'apple'" in turn.question for turn in record.turns[:1])
