"""Relaxed accuracy: what pix2struct's function gave for these pairs, quirks and all."""

import pytest

from alignvlm_jax.benchmarks.scores.numbers import relaxed_accuracy

GOLDEN = [
    ("105", "100", 1.0),
    ("105.01", "100", 0.0),
    ("95", "100", 1.0),
    ("94.9", "100", 0.0),
    ("-10", "10", 0.0),
    ("5%", "0.05", 1.0),
    ("5%", "5", 0.0),
    ("2019", "2010", 1.0),  # years are numbers too
    ("0", "0", 1.0),
    ("0.0", "0", 0.0),
    ("0.01", "0", 0.0),
    ("1,000", "1000", 0.0),
    ("$10", "10", 0.0),
    (" 10", "10", 1.0),
    ("1e2", "100", 1.0),
    ("nan", "1", 0.0),
    ("Yes", "yes", 1.0),
    ("yes.", "yes", 0.0),
    ("", "1", 0.0),
    ("five", "5", 0.0),
]


@pytest.mark.parametrize(("prediction", "answer", "score"), GOLDEN)
def test_golden_cases(prediction, answer, score):
    assert relaxed_accuracy(prediction, [answer]) == score


def test_any_answer_will_do():
    assert relaxed_accuracy("10", ["7", "10.4"]) == 1
    with pytest.raises(ValueError):
        relaxed_accuracy("10", [])
