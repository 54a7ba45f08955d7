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
    assert [[word.text for word in line] for line in read_lines(placed, [])] == [["שלום", "עולם"]]


def test_many_blocks_are_read_in_reasonable_time():
    """Lines that climb up the page are a block each."""
    placed = [
        PlacedWord(Word("x", (0.0, -12.0 * i, 10.0, 10 - 12.0 * i)), False) for i in range(20_000)
    ]
    assert len(read_lines(placed, [])) == 20_000
