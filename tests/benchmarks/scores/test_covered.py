"""Covered texts: found anywhere in an answer, each on its own."""

import pytest

from alignvlm_jax.benchmarks.scores.text import covered_exact_match, covered_jaccard

COVERED = ["the red brick house", "in 1904"]

GOLDEN = [
    ("the red brick house in 1904", 2.0, 2.0),
    ("The texts: 'in 1904', 'the red brick house'.", 2.0, 2.0),
    ("the red brick mouse", 0.0, 3 / 5),  # in common: the, red, brick
    ("The red brick house", 0.0, 3 / 5),  # case counts
    ("in 1905", 0.0, 1 / 3),
    ("red in 1904", 1.0, 1.0),  # too short for the first
    ("I cannot: in 1904", 0.0, 0.0),
    ("Sorry, in 1904", 0.0, 0.0),
    ("nothing of it all", 0.0, 0.0),
    ("", 0.0, 0.0),
]


@pytest.mark.parametrize(("prediction", "matches", "jaccard"), GOLDEN)
def test_golden_cases(prediction, matches, jaccard):
    assert covered_exact_match(prediction, COVERED) == (matches, 2.0)
    assert covered_jaccard(prediction, COVERED) == (pytest.approx(jaccard), 2.0)


def test_the_closest_run_counts():
    assert covered_exact_match("a red house, the red horse, the red house", ["the red house"]) == (
        1.0,
        1.0,
    )
