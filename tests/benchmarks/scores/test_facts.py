"""What counts as a verdict."""

import pytest

from alignvlm_jax.benchmarks.scores.text import fact_accuracy

GOLDEN = [
    ("True", "1", 1.0),
    ("False.", "0", 1.0),
    ("yes", "True", 1.0),
    ("Yes, it is", "yes", 1.0),
    ("No", "yes", 0.0),
    ("True or False", "1", 0.0),
    ("untrue", "1", 0.0),
    ("10", "1", 0.0),
    ("", "0", 0.0),
    ("perhaps", "perhaps", 0.0),
]


@pytest.mark.parametrize(("prediction", "answer", "score"), GOLDEN)
def test_golden_cases(prediction, answer, score):
    assert fact_accuracy(prediction, [answer]) == score
