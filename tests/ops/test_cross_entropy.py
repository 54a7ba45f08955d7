"""Losses against NumPy float64, also where the vocabulary is sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alignvlm_jax.ops import cross_entropy

RNG = np.random.default_rng(0)
LOGITS = (5 * RNG.standard_normal((4, 6, 10))).astype(np.float32)
TARGETS = RNG.integers(0, 10, (4, 6)).astype(np.int32)
WEIGHTS = (RNG.random((4, 6)) * (RNG.random((4, 6)) < 0.6)).astype(np.float32)


def sharded(loss, *axes: str):
    """`loss` compiled, its logits sharded by rows and by vocabulary."""
    return jax.jit(lambda logits, *args: loss(nn.with_logical_constraint(logits, axes), *args))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_sum_and_weight(mesh):
    loss_sum, weight_sum = sharded(cross_entropy.cross_entropy, "act_batch", "act_len", "act_vocab")(
        LOGITS, TARGETS, WEIGHTS
    )
    picked = np.take_along_axis(log_softmax(LOGITS), TARGETS[..., None], -1)[..., 0]
    assert loss_sum.shape == weight_sum.shape == ()
    assert float(loss_sum) == pytest.approx(-(picked * WEIGHTS).sum(), rel=1e-5)
    assert float(weight_sum) == pytest.approx(WEIGHTS.sum(dtype=np.float64), rel=1e-6)


def test_large_logits_stay_finite():
    loss_sum, _ = cross_entropy.cross_entropy(1e4 * LOGITS, TARGETS, WEIGHTS)
    picked = np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0]
    assert float(loss_sum) == pytest.approx(float(1e4 * ((LOGITS.max(-1) - picked) * WEIGHTS).sum()), rel=1e-4)


def test_bfloat16_logits_are_summed_in_float32():
    """log(1024) is not a bfloat16 number, and 1024 ones do not add up to 1024 in it."""
    zeros = jnp.zeros((1, 1, 1024), jnp.bfloat16)
    loss_sum, _ = cross_entropy.cross_entropy(zeros, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)))
    assert loss_sum.dtype == jnp.float32
    assert float(loss_sum) == pytest.approx(np.log(1024), rel=1e-6)


def test_pick():
    np.testing.assert_array_equal(
        cross_entropy.pick(LOGITS, TARGETS), np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0]
    )


def test_soft_cross_entropy(mesh):
    """Several labels a row, one id twice, and weights that do not sum to 1 (an unused patch has none)."""
    logits, ids = LOGITS.reshape(24, 10), RNG.integers(0, 10, (24, 3)).astype(np.int32)
    ids[0] = 4
    weights = RNG.random((24, 3)).astype(np.float32)
    weights[1] = 0
    losses = sharded(cross_entropy.soft_cross_entropy, "act_batch", "act_vocab")(logits, ids, weights)
    dense = np.zeros((24, 10))
    for row, label in np.ndindex(24, 3):
        dense[row, ids[row, label]] += weights[row, label]
    np.testing.assert_allclose(losses, -(dense * log_softmax(logits)).sum(-1), rtol=1e-5, atol=1e-6)
    assert losses[1] == 0
