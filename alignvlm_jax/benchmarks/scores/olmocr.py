"""Scores of olmOCR-bench: tests of the text that a model reads off a page.

The answers to its one question, `Read the page.`, are the tests of the page, a JSON object each,
with the keys of the benchmark's files and `split`, the name of the file that it is from. The
benchmark publishes the mean over splits of the fraction of tests that pass. Scores equal those of
the reference (allenai/olmocr, olmocr/bench) on the recorded cases of the tests here.

Quirks of the reference, all kept:
  - a text is compared after line breaks in HTML, bold, italics and white space are made alike, and
    quotes and dashes plain: but underscores of names count as italics ("a_b_c" is "abc");
  - `max_diffs` allows that many edits in a text of its length only roughly: the ratio of
    `rapidfuzz` counts a replaced letter as two;
  - `first_n` and `last_n` count characters after this, and 0 is none;
  - a text that is longer than the page is looked for the other way round: the page in it, so that a
    page of one letter has every text with this letter;
  - an order is right if any place of one text is before any place of the other; case always counts;
  - of a table's cells those count that are at least half alike, whatever `max_diffs` says;
  - a table in Markdown has its first row and first column for headings; one in HTML may stand
    within another, whose rows are then those of both;
  - a blank page passes all tests of absence, and `max_length` replaces all else of a baseline test;
  - Chinese, Japanese and emoji fail the baseline test of a page.
One differs: a cell spans 100 rows and columns at most.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fuzzysearch import find_near_matches
from rapidfuzz import fuzz

from alignvlm_jax.benchmarks.scores import page_tables
from alignvlm_jax.benchmarks.scores.page_tables import Place, Table
from alignvlm_jax.benchmarks.scores.task import LEFT_OUT, Task

MARKUP = (
    (r"<br/?>", " "),
    (r"\*\*(.*?)\*\*", r"\1"),
    (r"__(.*?)__", r"\1"),
    (r"</?b>", ""),
    (r"</?i>", ""),
    # Once more: what the tags had parted is bold now.
    (r"(\*\*|__)(.*?)\1", r"\2"),
    (r"(\*|_)(.*?)\1", r"\2"),
    (r"\s+", " "),
)
"""Patterns and what replaces them, in this order."""
PLAIN = str.maketrans(
    dict.fromkeys("‘’‚", "'")
    | dict.fromkeys("“”„", '"')
    | dict.fromkeys("–—‑‒−", "-")
    | {"＿": "_", "\N{MICRO SIGN}": "μ"}
)
DISALLOWED = re.compile(
    "[\u4e00-\u9fff\u3040-\u30ff\U0001f600-\U0001f64f\U0001f300-\U0001f5ff\U0001f680-\U0001f6ff"
    "\U0001f1e0-\U0001f1ff]"
)
"""Chinese, Japanese and emoji, which no page of the benchmark has."""
IMAGE = re.compile(r"!\[.*?\]\(.*?\)")
LONGEST_REPEAT = 5
MAX_REPEATS = 30
LEAST_ALIKE = 0.5
"""Least likeness of cells of a table."""


def pass_rates(prediction: str, answers: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Returns by split how many tests of a page pass, and how many there are of `CHECKS`.

    Raises:
      ValueError: an answer is no test.
    """
    found: dict[str, tuple[float, float]] = {}
    for test in map(_test, answers):
        # The others are in no split's count: of a split of formulas alone nothing is said.
        if check := CHECKS.get(test["type"]):
            passed, count = found.get(test["split"], (0.0, 0.0))
            found[test["split"]] = (passed + check(prediction, test), count + 1.0)
    return found


def left_out(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """Returns how many tests of a page are of other types than `CHECKS`, and how many there are."""
    return float(sum(_test(one)["type"] not in CHECKS for one in answers)), float(len(answers))


def _test(answer: str) -> dict[str, Any]:
    """Returns a test; raises ValueError if it is none."""
    test = json.loads(answer)
    # Another benchmark's answers, prepared under this one's name, are texts or numbers.
    if not isinstance(test, dict) or not {"type", "split"} <= test.keys():
        raise ValueError(f"no test of olmOCR-bench: {answer[:80]}")
    return test


@functools.lru_cache(maxsize=64)
def normalize(text: str) -> str:
    """Returns a text without its markup, with plain quotes and dashes, and single spaces."""
    for pattern, replacement in MARKUP:
        text = re.sub(pattern, replacement, text)
    return unicodedata.normalize("NFC", text).translate(PLAIN)


def _least(text: str, test: Mapping[str, Any]) -> float:
    """Returns the least likeness to a text that is taken for it."""
    return 1.0 - test.get("max_diffs", 0) / (len(text) or 1)


def is_present(prediction: str, test: Mapping[str, Any]) -> bool:
    """Whether a page has a text, or something like it."""
    wanted = normalize(test["text"])
    page = normalize(prediction)
    if not test.get("case_sensitive", True):
        wanted = wanted.lower()
        page = page.lower()
    first = test.get("first_n")
    last = test.get("last_n")
    if first or last:
        # Of a short page both may have the same characters, which then stand there twice.
        page = (page[:first] if first else "") + (page[-last:] if last else "")
    return fuzz.partial_ratio(wanted, page) / 100.0 >= _least(wanted, test)


def is_absent(prediction: str, test: Mapping[str, Any]) -> bool:
    """Whether a page has nothing like a text."""
    return not is_present(prediction, test)


def is_in_order(prediction: str, test: Mapping[str, Any]) -> bool:
    """Whether a page has one text before the other."""
    page = normalize(prediction)
    # The reference's own library: which of overlapping matches it keeps decides where they begin.
    starts = [
        [one.start for one in find_near_matches(text, page, max_l_dist=test.get("max_diffs", 0))]
        for text in (normalize(test["before"]), normalize(test["after"]))
    ]
    return all(starts) and min(starts[0]) < max(starts[1])


def has_cell(prediction: str, test: Mapping[str, Any]) -> bool:
    """Whether a table of the page has a cell, and beside it the cells that are wanted."""
    wanted = normalize(test["cell"])
    try:
        tables = page_tables.tables_of(prediction, not test.get("ignore_markdown_tables", False))
        return any(
            _is_like(wanted, cell.text, test) and _is_placed(table, place, test)
            for table in tables
            for place, cell in table.cells.items()
        )
    except page_tables.BadTable:
        # The reference stops at it, and fails all tests of tables on the page.
        return False


def _is_placed(table: Table, place: Place, test: Mapping[str, Any]) -> bool:
    """Whether the cells around one are those that a test names."""
    around = {side: table.beside(place, side) for side in page_tables.STEPS}
    for name, side in (("top_heading", "up"), ("left_heading", "left")):
        around[name] = table.headings(place, side) if test.get(name) else set()
    return all(
        any(_is_like(wanted, table.cells[one].text, test) for one in places)
        for name, places in around.items()
        if (wanted := normalize(test.get(name) or ""))
    )


def _is_like(wanted: str, cell: str, test: Mapping[str, Any]) -> bool:
    # Of the whole cell: a text within a longer one is another.
    likeness = fuzz.ratio(wanted, normalize(cell)) / 100.0
    return likeness >= max(LEAST_ALIKE, _least(wanted, test))


def is_sound(prediction: str, test: Mapping[str, Any]) -> bool:
    """Whether a page has letters or digits, no endless repetition at its end, and no characters of
    `DISALLOWED`; of a page that is blank, at most `max_length` letters and digits."""
    longest = test.get("max_length")
    if longest is not None and test.get("max_length_skips_image_alt_tags"):
        prediction = IMAGE.sub("", prediction)
    count = sum(map(str.isalnum, prediction))
    # What a blank page may have on it is all that is asked of it: not even a letter.
    if longest is not None:
        return count <= longest
    if not count or _repeats(prediction) > test.get("max_repeats", MAX_REPEATS):
        return False
    return not (test.get("check_disallowed_characters", True) and DISALLOWED.search(prediction))


def _repeats(text: str) -> int:
    """Returns how often the last characters of a text, 1 to `LONGEST_REPEAT` of them, stand there
    one after the other, at most."""
    text = re.sub(r"\s+", " ", text)
    most = 0
    # From the end: a page that went round in circles and then went on is sound.
    for size in range(1, min(LONGEST_REPEAT, len(text)) + 1):
        count = 1
        while text.endswith(text[-size:] * (count + 1)):
            count += 1
        most = max(most, count)
    return most


CHECKS: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "present": is_present,
    "absent": is_absent,
    "order": is_in_order,
    "table": has_cell,
    "baseline": is_sound,
}
"""What each type of test checks. Formulas are compared as they are drawn, by a browser: no test of
them is here, nor of formats and footnotes."""

TASK = Task(
    "olmocr_bench",
    "test",
    {"pass_rate": pass_rates, LEFT_OUT: left_out},
    # White space at the ends counts for the tests of the first and last characters.
    answer=str,
    max_new_tokens=4096,
    rates_silence=True,
    leaves_out="tests of formulas, formats and footnotes; formulas are compared as drawn",
)
