"""Parts of a benchmark add up to the whole, wherever it is cut."""

import random

import pytest

from alignvlm_jax.benchmarks import predictions


def test_parts_add_up_to_the_whole():
    rng = random.Random(0)
    parts = [{"anls": (rng.random(), 1.0), "f1": (2.0 * rng.randint(0, 1), 2.0)} for _ in range(20)]
    parts[3] = {}
    whole = predictions.total(parts)
    for cut in (0, 1, 7, 20):
        both = predictions.total(parts[:cut]) + predictions.total(parts[cut:])
        for name in ("anls", "f1"):
            assert both.score(name) == pytest.approx(whole.score(name), abs=1e-12)
    assert whole.weights == {"anls": 19.0, "f1": 38.0}


def test_no_question_that_counts_is_no_score():
    assert predictions.total([{}, {"f1": (0.0, 0.0)}]).score("f1") is None
    assert predictions.total([]).score("anls") is None
