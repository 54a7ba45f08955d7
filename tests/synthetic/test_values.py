import numpy as np
import pytest

from alignvlm_jax.benchmarks.scores import anls
from alignvlm_jax.synthetic import values


@pytest.mark.parametrize("kind", values.KINDS)
def test_the_best_constant_answer_scores_little(kind):
    rng = np.random.default_rng(0)
    drawn = [values.KINDS[kind](rng) for _ in range(400)]
    assert min(map(len, drawn)) >= 4
    train = drawn[:100]
    held_out = drawn[100:]
    best = max(train, key=lambda guess: sum(anls(guess, (value,)) for value in train))
    assert np.mean([anls(best, (value,)) for value in held_out]) < 0.1


def test_sides_of_the_split_are_disjoint_and_of_the_stated_share():
    rng = np.random.default_rng(0)
    drawn = [values.KINDS["Serial"](rng) for _ in range(4000)]
    fraction = np.mean([values.is_evaluation(value) for value in drawn])
    assert abs(fraction - values.EVALUATION_FRACTION) < 0.03
    assert not any(
        values.is_allowed(v, evaluation=True) and values.is_allowed(v, evaluation=False)
        for v in drawn
    )
    assert values.is_evaluation("Ames") == values.is_evaluation("AMES")


def test_training_shuns_the_words_of_a_value_too():
    word = next(w for w in map(str, range(10000, 10100)) if values.is_evaluation(w))
    assert not values.is_allowed(f"No {word}", evaluation=False)


@pytest.mark.parametrize("evaluation", [False, True])
def test_draw_keeps_to_its_side(evaluation):
    rng = np.random.default_rng(0)
    for kind in values.KINDS:
        assert values.is_evaluation(values.draw(kind, rng, evaluation)) == evaluation
