"""F1 of fields from counts, against its definition by precision and recall."""

import pytest

from alignvlm_jax.benchmarks.scores.text import field_f1

GOLDEN = [
    ("WXYZ ", ["wxyz"], (2.0, 2.0)),
    ("wxy", ["wxyz"], (0.0, 2.0)),  # one wrong, one missed
    ("", ["wxyz"], (0.0, 1.0)),
    ("None", ["wxyz"], (0.0, 1.0)),
    ("wxyz", ["None"], (0.0, 1.0)),
    ("none", ["None"], (0.0, 0.0)),
    ("1200.00", ["$1,200.00", "1200.00"], (2.0, 2.0)),
    ("$1,200.00", ["1200.00"], (0.0, 2.0)),
]


@pytest.mark.parametrize(("prediction", "answers", "counts"), GOLDEN)
def test_golden_cases(prediction, answers, counts):
    assert field_f1(prediction, answers) == counts


def test_the_ratio_of_sums_is_f1():
    """Of the cases above: 5 values predicted, 6 wanted, 2 hits."""
    counts = [field_f1(prediction, answers) for prediction, answers, _ in GOLDEN]
    precision = 2 / 5
    recall = 2 / 6
    ratio = sum(hits for hits, _ in counts) / sum(values for _, values in counts)
    assert ratio == pytest.approx(2 * precision * recall / (precision + recall))


def test_no_answer_is_an_error():
    with pytest.raises(ValueError):
        field_f1("a", [])
