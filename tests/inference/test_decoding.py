"""The choice of tokens against a plain one in NumPy, and answers that are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import decoding, sampler
from alignvlm_jax.inference.decoding import Decoding
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from tests.conftest import random_batch, random_params, tiny_config

CONFIG = tiny_config()
MODEL = vlm.VLM(
    dataclasses.replace(
        CONFIG.model, llm=dataclasses.replace(CONFIG.model.llm, tie_embeddings=False)
    )
)
ROWS = CONFIG.train.batch_size
VOCAB = CONFIG.model.llm.vocab_size
NUM_NEW = 6
PROMPTS = random_batch(CONFIG, seed=7)


def draws(logits: np.ndarray, one: Decoding, count: int, seen: np.ndarray | None = None):
    """Many tokens of the same logits [V]."""
    rows = [dataclasses.replace(one, seed=seed) for seed in range(count)]
    seen = np.zeros(len(logits), bool) if seen is None else seen
    return np.asarray(
        jax.jit(decoding.choose)(
            jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1)),
            jnp.tile(jnp.asarray(seen), (count, 1)),
            decoding.arrays(rows),
            jnp.full(count, 3),
        )
    )


def probabilities(logits: np.ndarray, one: Decoding, seen: np.ndarray) -> np.ndarray:
    """What transformers' processors make of logits, in their order: penalty, temperature, top_p."""
    penalty = one.repetition_penalty
    logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    p = np.exp((logits - logits.max()) / one.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), one.top_p) + 1]
    nucleus = np.zeros_like(p)
    nucleus[kept] = p[kept]
    return nucleus / nucleus.sum()


@pytest.mark.parametrize(
    "one",
    [
        Decoding(temperature=1.0),
        Decoding(temperature=0.5, top_p=0.7),
        Decoding(temperature=2.0, top_p=0.95, repetition_penalty=1.7),
        Decoding(temperature=1.3, top_p=1e-60),
        Decoding(temperature=1.0, repetition_penalty=0.5),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(one):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=24) * 2
    seen = rng.random(24) < 0.3
    expected = probabilities(logits, one, seen)
    count = 20_000
    found = np.bincount(draws(logits, one, count, seen), minlength=24) / count
    assert not found[expected == 0].any()
    # Five standard deviations of a fraction of so many draws.
    np.testing.assert_array_less(
        np.abs(found - expected), 5 * np.sqrt(expected * (1 - expected) / count) + 1e-9
    )


def test_without_temperature_the_likeliest_is_taken_after_the_penalty():
    logits = np.array([3.0, 2.9, -1.0, 0.5])
    assert set(draws(logits, Decoding(), 5)) == {0}
    seen = np.array([True, False, False, False])
    assert set(draws(logits, Decoding(repetition_penalty=1.1), 5, seen)) == {1}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"temperature": -1}, "temperature is -1; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be 0.01 to 100"),
        ({"seed": -1}, "seed is -1; it must be 0 to 4,294,967,295"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_values_out_of_range_are_refused(values, problem):
    with pytest.raises(UserError, match=problem):
        Decoding(**values)


def test_tokens_of_prompts_are_those_before_the_padding():
    tokens = jnp.array([[3, 5, 0, 0], [9, 1, 1, 0]])
    is_prompt = jnp.array([[True, True, False, False], [True, True, True, False]])
    # 9 is beyond the vocabulary, as the token of an image may be.
    seen = np.asarray(decoding.tokens_of_prompts(tokens, is_prompt, 7))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[3, 5], [1]]


@pytest.fixture(scope="module")
def generation():
    """A sampler on one device, and what its model is applied to."""
    params = random_params(MODEL, vlm.abstract_batch(CONFIG.model, CONFIG.data, ROWS))
    mesh = mesh_lib.single_device()
    boxed = jax.eval_shape(lambda: vlm.init_params(MODEL, jax.random.key(0)))
    params = jax.device_put(params, sharding.tree_sharding(boxed, mesh))
    return sampler.Sampler(MODEL, mesh, end_ids=(VOCAB,), pad_id=0), {"params": params}


def answers(generation, rows: list[Decoding], order=slice(None)) -> np.ndarray:
    ours, variables = generation
    batch = {name: array[order] for name, array in PROMPTS.items()} | decoding.arrays(rows)
    return ours.generate(variables, batch, NUM_NEW)


def test_greedy_rows_beside_drawn_ones_are_those_of_a_greedy_batch(generation):
    greedy = answers(generation, [Decoding()] * ROWS)
    mixed = [Decoding(temperature=float(row % 2), seed=row) for row in range(ROWS)]
    found = answers(generation, mixed)
    np.testing.assert_array_equal(found[::2], greedy[::2])
    assert (found[1::2] != greedy[1::2]).any()


def test_an_answer_depends_on_its_prompt_and_seed_alone(generation):
    rows = [Decoding(temperature=1.5, top_p=0.9, seed=row) for row in range(ROWS)]
    found = answers(generation, rows)
    np.testing.assert_array_equal(answers(generation, rows), found)
    np.testing.assert_array_equal(
        answers(generation, rows[::-1], slice(None, None, -1)), found[::-1]
    )
    others = [dataclasses.replace(row, seed=row.seed + 100) for row in rows]
    assert (answers(generation, others) != found).any()


def test_a_large_penalty_says_nothing_twice(generation):
    found = answers(generation, [Decoding(repetition_penalty=100)] * ROWS)
    for row, tokens in enumerate(found):
        of_prompt = PROMPTS["tokens"][row][PROMPTS["segment_ids"][row] > 0]
        assert len(set(tokens.tolist())) == NUM_NEW
        assert not set(tokens.tolist()) & set(of_prompt.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_a_few_tokens_at_a_time_are_those_at_once(generation, temperature):
    ours, variables = generation
    rows = [Decoding(temperature=temperature, seed=row) for row in range(ROWS)]
    batch = PROMPTS | decoding.arrays(rows)
    whole = ours.generate(variables, batch, NUM_NEW)
    answering = ours.begin(variables, batch, NUM_NEW)
    done = 1
    for steps in (0, 1, 3, 1, 4):
        answering = ours.advance(variables, answering, steps)
        done = min(done + steps, NUM_NEW)
        assert answering.step_B.tolist() == [done] * ROWS
        np.testing.assert_array_equal(answering.tokens_BT[:, :done], whole[:, :done])
    assert ours._advance._cache_size() == 1
