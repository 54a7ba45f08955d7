"""Parts of a benchmark add up to the whole, wherever it is cut."""

import random

import pytest

from alignvlm_jax.benchmarks.scores import sums


def test_parts_add_up_to_the_whole():
    rng = random.Random(0)
    parts = [{"anls": (rng.random(), 1.0), "f1": (2.0 * rng.randint(0, 1), 2.0)} for _ in range(20)]
    parts[3] = {}
    whole = sums.total(parts)
    for cut in (0, 1, 7, 20):
        both = sums.total(parts[:cut]) + sums.total(parts[cut:])
        for name in ("anls", "f1"):
            assert both.score(name) == pytest.approx(whole.score(name), abs=1e-12)
    assert whole.weights == {"anls": 19.0, "f1": 38.0}


def test_no_question_that_counts_is_no_score():
    assert sums.total([{}, {"f1": (0.0, 0.0)}]).score("f1") is None
    assert sums.total([]).score("anls") is None


def test_a_score_of_parts_is_their_mean():
    """However many questions a part has; one that no question counts for is none."""
    rows = [
        {"pass/a": (1.0, 3.0), "pass/b": (0.0, 1.0), "pass/c": (0.0, 0.0)},
        {"pass/a": (1.0, 1.0), "other": (1.0, 1.0), "passing/a": (1.0, 1.0)},
    ]
    whole = sums.total(rows)
    assert whole.parts("pass") == ["pass/a", "pass/b"]
    assert whole.score("pass/a") == 0.5
    assert whole.score("pass") == 0.25
    assert (sums.total(rows[:1]) + sums.total(rows[1:])).score("pass") == 0.25
    assert sums.total([{"pass/c": (0.0, 0.0)}]).score("pass") is None
