import pytest

from alignvlm_jax.data.record import Turn
from alignvlm_jax.ingest.formats.pdf.tables import questions
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.make_pdf import rule, table, text
from tests.ingest.formats.pdf.read_pdf import texts

FRUIT = [
    ["name", "size", "colour"],
    ["apple", "12 cm", "red"],
    ["pear", "9 cm", ""],
    ["plum", "4 cm", "deep\nblue"],
]
ASKED = {
    "In the row where name is 'apple', what is size?": "12 cm",
    "In the row where name is 'apple', what is colour?": "red",
    "In the row where name is 'pear', what is size?": "9 cm",
    "In the row where name is 'plum', what is size?": "4 cm",
    "In the row where name is 'plum', what is colour?": "deep blue",
}


def asked(record):
    assert all(len(turn.answers) == 1 for turn in record.turns)
    return {turn.question: turn.answers[0] for turn in record.turns}


def cell_texts():
    return "".join(
        text(24 + 80 * column, 169 - 20 * row - 9 * line, output, 8)
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
    assert asked(record) == ASKED


def test_a_table_on_a_turned_page(read):
    turned = f"q 0 1 -1 0 300 0 cm {table(20, 180, [80, 80, 80], FRUIT)} Q"
    (record,) = read([turned], page="/Rotate 90", size=(300, 300))
    assert asked(record) == ASKED


def test_a_table_is_read_by_rows_and_what_stands_around_it_in_order(read):
    """The cells are drawn column by column here, and from the last line."""
    by_columns = "".join(
        text(24 + 80 * column, 149 - 20 * row - 9 * line, output, 8)
        for column in range(3)
        for row, cells in enumerate(FRUIT)
        for line, output in reversed(list(enumerate(cells[column].split("\n"))))
    )
    rules = "".join(rule(20, y, 260, y) for y in range(80, 161, 20))
    rules += "".join(rule(x, 80, x, 160) for x in (100, 180))
    (record,) = read([text(20, 180, "before") + by_columns + rules + text(20, 50, "after")])
    assert texts(record) == [
        "before", "name size colour", "apple 12 cm red", "pear 9 cm", "plum 4 cm deep", "blue", "after"
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
    assert "In the row where name is 'apple', what is size?" not in asked(record)
    assert asked(record)["In the row where name is 'apple', what is colour?"] == "red"
    assert asked(record)["In the row where name is 'fig', what is size?"] == "3 cm"


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
def test_questions_have_one_answer(rows, expected):
    assert questions(rows) == [
        Turn(f"In the row where {key} is '{name}', what is {asked}?", (answer,))
        for key, name, asked, answer in expected
    ]
