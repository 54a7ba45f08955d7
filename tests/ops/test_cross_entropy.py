"""Losses against NumPy float64, plain and chunked, also where the vocabulary is sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.ops import cross_entropy

RNG = np.random.default_rng(0)
ROWS = 4
LENGTH = 6
WIDTH = 8
WORDS = 10
HIDDEN = RNG.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
HEAD = (2 * RNG.standard_normal((WIDTH, WORDS))).astype(np.float32)
TARGETS = RNG.integers(0, WORDS, (ROWS, LENGTH)).astype(np.int32)
WEIGHTS = (RNG.random((ROWS, LENGTH)) * (RNG.random((ROWS, LENGTH)) < 0.6)).astype(np.float32)
BLOCKS = pytest.mark.parametrize("chunk", [None, 1, 4, 6, 50])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def losses(
    hidden, head, chunk=None, is_table=False, unpadded_vocab_size=None, targets=TARGETS
) -> cross_entropy.TokenLosses:
    matrix = head.T if is_table else head
    return cross_entropy.token_losses(
        hidden,
        matrix,
        targets,
        is_table=is_table,
        unpadded_vocab_size=unpadded_vocab_size,
        chunk=chunk,
    )


@BLOCKS
@pytest.mark.parametrize("is_table", [False, True], ids=["head", "tied"])
def test_losses(mesh, chunk, is_table):
    result = jax.jit(lambda hidden, head: losses(hidden, head, chunk, is_table))(HIDDEN, HEAD)
    logits = HIDDEN.astype(np.float64) @ HEAD
    expected = -np.take_along_axis(log_softmax(logits), TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.nll, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.log_sum_exp, np.log(np.exp(logits).sum(-1)), rtol=1e-5)
    np.testing.assert_array_equal(result.is_correct, logits.argmax(-1) == TARGETS)
    assert 0 < result.is_correct.sum() < TARGETS.size


def test_rows_that_do_not_divide_over_the_mesh(mesh):
    """15 over 4 shards."""
    hidden = HIDDEN[:3, :5]
    targets = TARGETS[:3, :5]
    chunked, plain = (
        jax.jit(lambda hidden, chunk=chunk: losses(hidden, HEAD, chunk, targets=targets))(hidden)
        for chunk in (4, None)
    )
    np.testing.assert_allclose(chunked.log_sum_exp, plain.log_sum_exp, rtol=1e-6)
    # The difference of two numbers about as large as log_sum_exp, whose rounding it has.
    rounding = 1e-6 * np.abs(plain.log_sum_exp).max()
    np.testing.assert_allclose(chunked.nll, plain.nll, rtol=1e-6, atol=rounding)
    np.testing.assert_array_equal(chunked.is_correct, plain.is_correct)


@BLOCKS
@pytest.mark.parametrize("is_table", [False, True], ids=["head", "tied"])
def test_gradients(mesh, chunk, is_table):
    """Of the weighted sum and a z-loss: (P - target) weight, and 2 log_sum_exp P weight."""

    def total(hidden, head):
        result = losses(hidden, head, chunk, is_table)
        return (result.nll * WEIGHTS).sum() + 0.1 * (result.log_sum_exp**2 * WEIGHTS).sum()

    dhidden, dhead = jax.jit(jax.grad(total, argnums=(0, 1)))(HIDDEN, HEAD)
    logits = HIDDEN.astype(np.float64) @ HEAD
    fractions = np.exp(log_softmax(logits))
    total = np.log(np.exp(logits).sum(-1, keepdims=True))
    dlogits = (fractions - np.eye(WORDS)[TARGETS] + 0.2 * total * fractions) * WEIGHTS[..., None]
    np.testing.assert_allclose(
        dhidden, dlogits @ HEAD.T, rtol=0, atol=1e-5 * np.abs(dlogits @ HEAD.T).max()
    )
    expected = np.einsum("btd,btv->dv", HIDDEN.astype(np.float64), dlogits)
    np.testing.assert_allclose(dhead, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("chunk", [None, 4])
def test_padded_rows_are_never_predicted(mesh, chunk):
    """As if the head had no such columns, however large they are."""
    words = WORDS - 2
    targets = TARGETS % words
    large = HEAD.copy()
    large[:, words:] += 100
    padded = jax.jit(
        lambda head: losses(HIDDEN, head, chunk, unpadded_vocab_size=words, targets=targets)
    )(large)
    cut = losses(HIDDEN, HEAD[:, :words], targets=targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), padded, cut)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_target_that_is_no_word_is_finite(chunk):
    """Image tokens have such targets, without weight."""
    # In the padding of the table, and beyond it on both sides.
    for target in (WORDS - 1, WORDS + 5, -1, -100):
        result = losses(
            HIDDEN,
            HEAD,
            chunk,
            unpadded_vocab_size=WORDS - 2,
            targets=np.full_like(TARGETS, target),
        )
        assert np.isfinite(result.nll).all()
        if not 0 <= target < WORDS:
            np.testing.assert_array_equal(result.nll, result.log_sum_exp)


def test_large_logits_stay_finite():
    result = losses(HIDDEN, 1e4 * HEAD)
    logits = 1e4 * HIDDEN.astype(np.float64) @ HEAD
    picked = np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.nll, logits.max(-1) - picked, rtol=1e-4)


def test_bfloat16_logits_are_summed_in_float32():
    """log(1024) is not a bfloat16 number, and 1024 ones do not add up to 1024 in it."""
    hidden = jnp.zeros((1, 1, 2), jnp.bfloat16)
    head = jnp.zeros((2, 1024))
    result = losses(hidden, head, targets=jnp.zeros((1, 1), jnp.int32))
    assert result.nll.dtype == jnp.float32
    assert float(result.nll[0, 0]) == pytest.approx(np.log(1024), rel=1e-6)


def test_pick():
    logits = HIDDEN @ HEAD
    np.testing.assert_array_equal(
        cross_entropy.pick(logits, TARGETS),
        np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0],
    )


def test_soft_cross_entropy():
    """Several labels a row, one id twice, and weights that do not sum to 1 (an unused patch has
    none)."""
    logits = (HIDDEN @ HEAD).reshape(24, 10)
    ids = RNG.integers(0, 10, (24, 3)).astype(np.int32)
    ids[0] = 4
    weights = RNG.random((24, 3)).astype(np.float32)
    weights[1] = 0
    picked = np.take_along_axis(logits, ids, -1)
    result = cross_entropy.soft_cross_entropy(picked, jax.nn.logsumexp(logits, axis=-1), weights)
    dense = np.zeros((24, 10))
    for row, label in np.ndindex(24, 3):
        dense[row, ids[row, label]] += weights[row, label]
    np.testing.assert_allclose(result, -(dense * log_softmax(logits)).sum(-1), rtol=1e-5, atol=1e-6)
    assert result[1] == 0


def test_a_label_without_weight_may_be_a_word_that_is_left_out():
    """Labels that a patch does not have are id 0, which a subset may not hold."""
    logits = jnp.array([[-jnp.inf, 2.0]])
    weights = jnp.array([[0.0, 0.5]])
    loss, gradient = jax.value_and_grad(
        lambda x: cross_entropy.soft_cross_entropy(x, jnp.ones(1), weights).sum()
    )(logits)
    assert float(loss) == pytest.approx(0.5 * (1 - 2))
    np.testing.assert_array_equal(gradient, [[0.0, -0.5]])


# Compiled once for a shape: hundreds of draws are made below.
@functools.partial(jax.jit, static_argnums=(5, 6))
def sampled_loss(x, head, norm, labels, weights, num_valid, size):
    def loss(head):
        losses = cross_entropy.sampled_cross_entropy(
            x, head, (*norm, 1e-5), labels, weights, num_valid, size
        )
        return losses.sum(), losses

    grad, losses = jax.grad(loss, has_aux=True)(head)
    return losses, grad


def sampled(size: int, labels: np.ndarray, num_valid: int = 50, seed: int = 0):
    """The sampled loss, what it estimates in float64, and its gradient with regard to W."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(labels), WIDTH)).astype(np.float32)
    head = rng.standard_normal((WIDTH, 53)).astype(np.float32)
    norm = rng.uniform(0.5, 1.5, 53).astype(np.float32), rng.random(53).astype(np.float32)
    weights = rng.random(labels.shape).astype(np.float32)

    nll, grad = sampled_loss(x, head, norm, labels, weights, num_valid, size)
    z = (x.astype(np.float64) @ head)[:, :num_valid]
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    log_p = log_softmax(z * norm[0][:num_valid] + norm[1][:num_valid])
    expected = -(np.take_along_axis(log_p, labels, 1) * weights).sum(-1)
    return nll, expected, grad


def test_a_sample_of_all_entries_is_exact():
    """Padding beyond them stands for nothing, also where the sample has room for it."""
    labels = RNG.integers(0, 50, (9, 3)).astype(np.int32)
    for size in (50, 53):
        nll, expected, _ = sampled(size, labels)
        np.testing.assert_allclose(nll, expected, rtol=1e-5)


def test_a_sample_estimates_the_loss_of_all_entries():
    """Over many draws: within a tenth, where a tenth of the entries that are no labels are seen."""
    found = []
    for seed in range(200):
        # A draw is a function of the labels: others that weigh next to nothing change it.
        labels = np.array([[3, seed % 50], [7, seed % 50]], np.int32)
        nll, expected, grad = sampled(8, labels, seed=seed)
        found.append(nll - expected)
        seen = np.flatnonzero(np.abs(np.asarray(grad)).sum(0))
        assert {3, 7, seed % 50} <= set(seen.tolist()) and len(seen) == 8
    assert np.abs(np.mean(found)) < 0.1 < np.std(found)


def test_labels_that_find_no_place_in_a_sample_have_no_loss_and_others_count_for_them():
    labels = np.arange(12, dtype=np.int32)[:, None]
    nll, _, _ = sampled(8, labels)
    assert (np.asarray(nll) > 0).sum() == 4 and np.isfinite(nll).all()


@pytest.mark.parametrize("size", [1, 2, 8, 24, 25, 49, 50, 53])
@pytest.mark.parametrize("num_labels", [1, 24, 26, 50])
def test_a_sample_stands_for_the_whole_vocabulary(size, num_labels):
    """Where labels had all places, LN's mean and variance would be those of a part of it."""
    sample = cross_entropy.Sample.of_labels(np.arange(num_labels)[:, None], 53, 50, size)
    ids = np.asarray(sample.ids)
    assert len(set(ids.tolist())) == size
    total = np.asarray(sample.weights).sum()
    assert total == pytest.approx(50 if size > 1 and num_labels < 50 else total)
    is_there = np.isin(np.arange(num_labels), ids)
    if num_labels <= max(size // 2, 1) or size >= 50:
        assert is_there.all()
    else:
        assert 0 < is_there.sum() < num_labels


def test_which_labels_find_no_place_is_drawn():
    """Of the least they would be the rarest tokens, in every step; and the mean is no better."""
    num_there = np.zeros(12)
    ratios = []
    for seed in range(100):
        # A label that moves from draw to draw, beside twelve that stay.
        labels = np.append(np.arange(12), 12 + seed % 38).astype(np.int32)[:, None]
        nll, expected, _ = sampled(9, labels, seed=seed)
        num_there += np.asarray(nll)[:12] > 0
        ratios.append(np.asarray(nll).mean() / expected.mean())
    assert num_there.min() > 15 and num_there.max() < 50
    assert abs(np.mean(ratios) - 1) < 0.15
