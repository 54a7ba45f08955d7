"""Amounts with scales and units: what TableVQA-Bench's evaluator gave for these pairs."""

import pytest

from alignvlm_jax.benchmarks.scores.numbers import amount_accuracy

GOLDEN = [
    ("$3,852 million", "3852", 1.0),
    ("$3,852 million", "3,852,000,000", 1.0),
    ("3.2 Million", "3.2%", 1.0),
    ("34.2%", "0.342", 1.0),
    ("(1,200)", "1200", 1.0),
    ("-1200", "(1,200)", 0.0),
    ("12 shares", "12", 1.0),
    ("5 years", "5", 1.0),
    ("October 31.", "october 31", 1.0),
    ("October 31", "October 30", 0.0),
    ("12", "13", 0.0),
]


@pytest.mark.parametrize(("prediction", "answer", "score"), GOLDEN)
def test_golden_cases(prediction, answer, score):
    assert amount_accuracy(prediction, [answer]) == score
