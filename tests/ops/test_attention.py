"""Masked grouped attention against a loop, and the causal mask against its docstring."""

import jax.numpy as jnp
import numpy as np

from alignvlm_jax.ops import attention


def test_causal_mask():
    segment_ids = jnp.array([[1, 1, 2, 2], [1, 0, 0, 0]])
    expected = [
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
    ]
    np.testing.assert_array_equal(attention.causal_mask(segment_ids), np.array(expected, bool))


def test_grouped_heads_and_mask():
    rng = np.random.default_rng(0)
    batch, length, keys, heads, kv_heads, head_dim = 2, 3, 5, 4, 2, 6
    query = rng.standard_normal((batch, length, heads, head_dim)).astype(np.float32)
    key, value = rng.standard_normal((2, batch, keys, kv_heads, head_dim)).astype(np.float32)
    mask = rng.random((batch, length, keys)) < 0.5
    mask[..., 0] = True
    expected = np.zeros(query.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = np.flatnonzero(mask[b, t])
        scores = key[b, seen, h // 2].astype(np.float64) @ query[b, t, h] / np.sqrt(head_dim)
        expected[b, t, h] = np.exp(scores) / np.exp(scores).sum() @ value[b, seen, h // 2]
    np.testing.assert_allclose(attention.attention(query, key, value, jnp.array(mask)), expected, atol=1e-5)


def test_softmax_is_float32_under_bfloat16():
    """Over 512 equal keys a sum in bfloat16 stops growing at 256, and the average of ones would not be one."""
    ones = jnp.ones((1, 512, 1, 2), jnp.bfloat16)
    mixed = attention.attention(ones[:, :1], ones, ones)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(mixed), 1.0)
