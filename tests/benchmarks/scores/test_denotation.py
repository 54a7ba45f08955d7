"""Denotation accuracy by hand, by the rules of the official evaluator of WikiTableQuestions."""

import time

import pytest

from alignvlm_jax.benchmarks.scores import denotation

GOLDEN = [
    ("Canada", "canada", 1.0),
    ("São Paulo", "sao paulo", 1.0),
    ("university of virginia†‡*", "University of Virginia", 1.0),
    ("Freeman[3] (won)", "freeman", 1.0),
    ("“More”", "more.", 1.0),
    ("3–1", "3-1", 1.0),
    ("[3]", "3", 0.0),  # a citation alone leaves nothing
    ("2", "2.0", 1.0),
    ("1e3", "1000", 1.0),
    ("1000.0000001", "1000", 1.0),
    ("999.9999999", "1000", 0.0),  # cut to 999
    ("1,000", "1000", 0.0),
    ("two", "2", 0.0),
    ("$5", "5", 0.0),
    ("2004-03-XX", "2004-3-xx", 1.0),
    ("2004-xx-xx", "2004", 1.0),
    ("2004-13-01", "2004-13-1", 0.0),  # no date
    ("march 2004", "2004-03-xx", 0.0),
    ("b|a", "a|b", 1.0),
    ("a|b|A.", "a|b", 1.0),  # a value counts once
    ("a", "a|b", 0.0),
    ("a|b|c", "a|b", 0.0),
    ("2|3", "3.0|2.0", 1.0),
    ("nan", "nan", 1.0),  # a text
    ("9" * 400, "1.5", 0.0),
    ("", "0", 0.0),
]


@pytest.mark.parametrize(("prediction", "answer", "score"), GOLDEN)
def test_golden_cases(prediction, answer, score):
    assert denotation.denotation_accuracy(prediction, [answer]) == score


def test_any_answer_will_do():
    assert denotation.denotation_accuracy("2", ["3", "2"]) == 1
    with pytest.raises(ValueError):
        denotation.denotation_accuracy("2", [])


def test_a_model_that_stutters_takes_no_time():
    started = time.monotonic()
    assert denotation.normalize("x" + "[1]" * 60 + "y") == "x" + "[1]" * 60 + "y"
    assert time.monotonic() - started < 1
