"""OCRBench v2: what the reference says of recorded answers, and what is ours."""

import json
import pathlib
import time

import pytest

from alignvlm_jax.benchmarks.scores import ocrbench_v2
from alignvlm_jax.errors import UserError

CASES = json.loads((pathlib.Path(__file__).parent / "ocrbench_v2_cases.json").read_text())


def score(kind, answers, prediction, question="?"):
    asked = (prediction, answers, question, kind)
    [(value, weight)] = (ocrbench_v2.english(*asked) | ocrbench_v2.chinese(*asked)).values()
    assert weight == 1.0
    return value


def test_all_recorded_cases_are_as_the_reference_has_them():
    """See make_ocrbench_v2_cases.py."""
    wrong = [
        case for case in CASES["cases"] if score(*case[:3]) != pytest.approx(case[3], abs=1e-12)
    ]
    assert not wrong
    assert len(CASES["cases"]) == 984
    # Every type that is scored stands there, in each of its ways.
    known = {
        f"{name}/{way}".rstrip("/") for name, ways in ocrbench_v2.SCORERS.items() for way in ways
    }
    assert {case[0] for case in CASES["cases"]} == known


def test_types_are_in_one_list_each():
    """The benchmark has 30."""
    assert len(ocrbench_v2.SCORERS) + len(ocrbench_v2.NOT_SCORED) == 30
    assert not set(ocrbench_v2.SCORERS) & set(ocrbench_v2.NOT_SCORED)


def test_what_is_left_out_has_no_score():
    asked = ("", ["1"], "Where?", "text grounding en")
    assert ocrbench_v2.english(*asked) == {} and ocrbench_v2.left_out(*asked) == (1.0, 1.0)
    # Of a type whose short answers alone are scored.
    asked = ("A", ["A"], "\u7b80\u7b54", ocrbench_v2.HANDWRITTEN)
    assert ocrbench_v2.chinese(*asked) == {} and ocrbench_v2.left_out(*asked) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("parquet", "no type of OCRBench v2: 'parquet'; known: "),
        ("text counting en", "source of a record is text counting en/exact match or text counting"),
        ("science QA en/choice", "does not evaluate 'science QA en' by 'choice'"),
    ],
)
def test_an_unknown_type_or_way_is_refused(kind, says):
    """Else a count would be scored like any answer."""
    with pytest.raises(UserError, match=says):
        ocrbench_v2.english("", ["1"], "?", kind)


def test_a_page_of_white_space_takes_no_time():
    began = time.monotonic()
    for prediction in (" \n" * 4000 + "a", "a " * 8000, "'" * 8000, ": " * 8000, "a:\n" * 4000):
        ocrbench_v2.predicted_fields(prediction)
    assert time.monotonic() - began < 20


def test_wanted_numbers_are_compared_as_texts():
    assert score("key information extraction en", ['{"total": 12.5}'], '{"total": "12.5"}') == 1.0
