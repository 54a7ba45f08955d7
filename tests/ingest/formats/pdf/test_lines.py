import itertools

import pytest

from alignvlm_jax.data.record import Word
from alignvlm_jax.ingest.formats.pdf.lines import read_lines
from alignvlm_jax.ingest.formats.pdf.words import PlacedWord
from tests.ingest.formats.pdf.make_pdf import text
from tests.ingest.formats.pdf.read_pdf import texts

LEFT = [(20, 150 - 15 * i, f"left {i} of it") for i in range(4)]
RIGHT = [(160, 150 - 15 * i, f"right {i}") for i in range(4)]
COLUMNS = [line for _, _, line in LEFT + RIGHT]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (LEFT + RIGHT, COLUMNS),
        ([(150, 185, "head"), *LEFT, *RIGHT, (150, 10, "7")], ["head", *COLUMNS, "7"]),
        # The page's number and head come first or last in many files.
        ([(150, 10, "7"), *LEFT, *RIGHT, (20, 185, "a head")], ["a head", *COLUMNS, "7"]),
        # Both last, as browsers print them.
        ([*LEFT, *RIGHT, (20, 185, "a head"), (150, 10, "7")], ["a head", *COLUMNS, "7"]),
        ([*LEFT, *RIGHT, (20, 185, "head"), (150, 185, "date"), (20, 10, "at"), (150, 10, "7")], ["head date", *COLUMNS, "at 7"]),
        # A note that is written first stays in its column.
        ([(20, 60, "note"), (20, 45, "in two"), *LEFT, *RIGHT[:2]], [*COLUMNS[:4], "note", "in two", *COLUMNS[4:6]]),
        # Pieces of a line, also those that come from right to left.
        ([(20, 150, "one"), (60, 151, "line"), (100, 150, "here")], ["one line here"]),
        ([(100, 150, "here"), (20, 150, "one")], ["one here"]),
        ([(20, 150, "E = mc"), (49, 154, "2"), (20, 120, "next")], ["E = mc2", "next"]),
    ],
)  # fmt: skip
def test_order_of_lines(read, places, expected):
    (record,) = read(["".join(text(*place, 9) for place in places)])
    assert texts(record) == expected


def test_a_word_that_is_broken_stays_so(read):
    """pdfium joins what a hyphen breaks; a person sees two lines."""
    (record,) = read([text(20, 150, "a docu-") + text(20, 135, "ment")])
    assert texts(record) == ["a docu-", "ment"]


def test_lines_up_and_down_the_page(read):
    (record,) = read([text(20, 20, "up the side", matrix="0 1 -1 0") + text(60, 150, "the text")])
    assert texts(record) == ["the text", "up the side"]
    assert all(word.edges is None for word in record.lines[0][1])


@pytest.mark.parametrize("turn", [0, 90, 270])
def test_a_page_that_is_shown_sideways_is_read_as_it_was_written(read, turn):
    """pdfium orders text by how the page is displayed: its lines came last to first."""
    page = ["Report of 2026", *(f"line {i} of the text" for i in range(6)), "The end"]
    content = "".join(text(20, 170 - 20 * i, line, 9) for i, line in enumerate(page))
    (record,) = read([content], page=f"/Rotate {turn}")
    assert texts(record) == page
    assert all((word.edges is None) == bool(turn) for word in record.lines[0][3])


def test_a_script_from_right_to_left_keeps_its_order():
    placed = [
        PlacedWord(Word(word, (x, 0.0, x + 10, 10.0)), False)
        for word, x in (("שלום", 80.0), ("עולם", 60.0))
    ]
    assert [[placed.word.text for placed in line] for line in read_lines(placed, [])] == [
        ["שלום", "עולם"]
    ]


def test_many_blocks_are_read_in_reasonable_time():
    """Lines that climb up the page are a block each."""
    placed = [
        PlacedWord(Word("x", (0.0, -12.0 * i, 10.0, 10 - 12.0 * i)), False) for i in range(20_000)
    ]
    assert len(read_lines(placed, [])) == 20_000


PROSE = [(20, 170 - 12 * i, f"text number {i} goes on and on and on for long") for i in range(6)]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        # Two columns, line by line across them.
        (
            [place for i in range(6) for place in ((20, 170 - 12 * i, f"left column {i}"), (150, 170 - 12 * i, f"right column {i}"))],
            [f"left column {i}" for i in range(6)] + [f"right column {i}" for i in range(6)],
        ),
        # The right one is shorter.
        (
            [place for i in range(6) for place in ((20, 170 - 12 * i, f"left column {i}"), (150, 170 - 12 * i, f"right column {i}"))[: 1 if i > 3 else 2]],
            [f"left column {i}" for i in range(6)] + [f"right column {i}" for i in range(4)],
        ),
        # A table is read across: its cells have few words.
        (
            [place for i in range(6) for place in ((20, 170 - 12 * i, f"name {i}"), (150, 170 - 12 * i, "12"))],
            [f"name {i} 12" for i in range(6)],
        ),
        # So are two lines of a letter's head.
        (
            [place for i in range(2) for place in ((20, 170 - 12 * i, f"left column {i}"), (150, 170 - 12 * i, f"right column {i}"))],
            [f"left column {i} right column {i}" for i in range(2)],
        ),
    ],
)  # fmt: skip
def test_columns_that_are_written_across(read, places, expected):
    (record,) = read(["".join(text(*place, 9) for place in places)])
    assert texts(record) == expected


def test_bullets_that_are_drawn_last_come_before_their_items(read):
    bullets = [(10, 170 - 24 * i, "\x95") for i in range(3)]
    (record,) = read(["".join(text(*place, 9) for place in [*PROSE, *bullets])])
    expected = [line for _, _, line in PROSE]
    assert texts(record) == [line if i % 2 else f"• {line}" for i, line in enumerate(expected)]
    (record,) = read([text(10, 50, "\x95", 9) + text(60, 150, "far from it", 9)])
    assert texts(record) == ["far from it", "•"]


def test_the_texts_of_a_figure_are_read_as_they_stand(read):
    labels = [
        (160, 80, "end"),
        (20, 140, "start"),
        (90, 60, "no"),
        (90, 110, "yes"),
        (160, 140, "then"),
        (20, 80, "or"),
    ]
    content = "".join(text(*place, 9) for place in [(20, 180, "above the figure there is a line"), *labels])  # fmt: skip
    (record,) = read([content])
    assert texts(record)[1:] == ["start", "then", "yes", "or", "end", "no"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("Name ........................ 12", ["Name ... 12"]),
        ("Name" + " ." * 30 + " 12", ["Name ... 12"]),
        ("Name........................12", ["Name ... 12"]),
        ("and so on ... or not..", ["and so on ... or not.."]),
        ("\xb7\xb7\xb7\xb7\xb7\xb7 x", ["... x"]),
        ("end. . . . . . . . 5", ["end ... 5"]),
    ],
)
def test_leaders_are_short(read, shown, expected):
    (record,) = read([text(20, 100, shown, 9)])
    assert texts(record) == expected
    # The dots' word is as long as they are, and words lie side by side.
    boxes = [word.box for word in record.lines[0][0]]
    assert all(a[2] <= b[0] + 0.1 for a, b in itertools.pairwise(boxes))
    assert boxes[-1][2] > 50


CODE = ["def f(x):", "    if x:", "        return 1", "    return 2"]


@pytest.mark.parametrize(("indent", "expected"), [(True, CODE), (False, [c.strip() for c in CODE])])
def test_code_is_indented_if_asked(read, indent, expected):
    content = "".join(
        text(20 + 5.4 * (len(line) - len(line.strip())), 150 - 11 * i, line.strip(), 9, font="F3")
        for i, line in enumerate(CODE)
    )
    (record,) = read([content + text(40, 50, "no code", 9)], indent=indent)
    assert texts(record) == [*expected, "no code"]
    for word in (word for line in record.lines[0] for word in line):
        assert len(word.edges) == len(word.text) + 1
        assert list(word.edges) == sorted(word.edges)


def word(text, left, right):
    return PlacedWord(Word(text, (left, 0.0, right, 10.0)), False, em=10.0)


@pytest.mark.parametrize(
    ("placed", "expected"),
    [
        # Content in any order.
        ([word("עולם", 60, 80), word("שלום", 82, 99)], "שלום עולם"),
        ([word("שלום", 82, 99), word("עולם", 60, 80)], "שלום עולם"),
        ([word("שלום", 82, 99), word("12", 60, 80), word("34", 40, 58), word("עולם", 20, 38)], "שלום 34 12 עולם"),
        ([word("big", 20, 40), word("word", 42, 60), word("שלום", 62, 80), word("אור", 1, 18)], "שלום big word אור"),
        ([word("a", 0, 9), word("of", 10, 20), word("the", 22, 30), word("שלום", 62, 80), word("עולם", 32, 60)], "a of the שלום עולם"),
    ],
)  # fmt: skip
def test_lines_of_both_directions(placed, expected):
    (line,) = read_lines(placed, [])
    assert " ".join(placed.word.text for placed in line) == expected
