"""olmOCR-bench: what the reference says of recorded pages, and what is ours."""

import json
import pathlib
import time

import pytest

from alignvlm_jax.benchmarks.scores import olmocr, page_tables

CASES = json.loads((pathlib.Path(__file__).parent / "olmocr_cases.json").read_text())


def test_all_recorded_cases_are_as_the_reference_has_them():
    """See make_olmocr_cases.py. Half of each type pass."""
    wrong = [
        (page, test, passed)
        for page, tests in CASES["pages"]
        for test, passed in tests
        if bool(olmocr.CHECKS[test["type"]](page, test)) != passed
    ]
    assert not wrong
    assert sum(len(tests) for _, tests in CASES["pages"]) == 795


def test_splits_are_counted_apart_and_what_is_not_checked_is_left_out():
    tests = [
        {"type": "present", "split": "a", "text": "one"},
        {"type": "present", "split": "a", "text": "two"},
        {"type": "absent", "split": "b", "text": "three"},
        {"type": "math", "split": "c", "math": "x"},
    ]
    answers = list(map(json.dumps, tests))
    assert olmocr.pass_rates("**one**", answers) == {"a": (1.0, 2.0), "b": (1.0, 1.0)}
    assert olmocr.left_out("", answers) == (1.0, 4.0)


@pytest.mark.parametrize("answer", ["12.50", "[1]", '{"type": "present"}'])
def test_what_is_no_test_is_refused(answer):
    with pytest.raises(ValueError):
        olmocr.pass_rates("", [answer])


def test_endless_tables_take_no_time_and_no_memory():
    """As models write them that have lost the thread."""
    cell = '<td rowspan="99999999" colspan="99999999">1</td>'
    test = {"type": "table", "cell": "1", "right": "1"}
    began = time.monotonic()
    assert olmocr.has_cell(f"<table><tr>{cell * 200}", test) is True
    assert olmocr.has_cell(f"<table><tr>{'<td>1' * 1000}", test) is False
    assert olmocr.has_cell(f"<table>{'<tr><td>1</td><td>1</td>' * 1000}", test) is True
    assert olmocr.has_cell("| 1 " * 2000 + "|\n" + "|-" * 2000, test) is True
    assert time.monotonic() - began < 30


def test_places_of_cells():
    """A head over two columns, a cell of two rows, and a row that is shorter."""
    [table] = page_tables.tables_of(
        "<table><tr><th>A<th colspan=2>B</tr>".replace("<th>A", "<th>A</th>").replace("B", "B</th>")
        + "<tr><td rowspan=2>c</td><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>"
    )
    texts = {place: cell.text for place, cell in table.cells.items()}
    assert texts == {(0, 0): "A", (0, 1): "B", (1, 0): "c", (1, 1): "1", (1, 2): "2", (2, 1): "3"}
    assert table.beside((0, 1), "down") == {(1, 1), (1, 2)}
    assert table.beside((1, 0), "right") == {(1, 1), (2, 1)}
    assert table.beside((2, 1), "right") == set()
    assert table.headings((2, 1), "up") == {(0, 1)}
    # No cell on the left is a head: the last one on the way counts.
    assert table.headings((1, 2), "left") == {(1, 0)}
