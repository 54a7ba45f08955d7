"""Masked attention with grouped key-value heads, and its masks."""

import jax
import jax.numpy as jnp

from alignvlm_jax.shapes import Array, Bool, Float, Int


def attention(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B S K h"],
    value: Float[Array, "B S K h"],
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T H h"]:
    """Returns softmax(query key^T / sqrt(h)) value, softmax in float32; query head i reads key head i // (H / K)."""
    return jax.nn.dot_product_attention(query, key, value, mask=None if mask is None else mask[:, None])


def causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Returns who sees whom: a token sees itself and what stands before it in its own segment.

    segment_ids [1 1 2 2] gives   1 0 0 0
                                  1 1 0 0
                                  0 0 1 0
                                  0 0 1 1
    Image slots are tokens like any other: they see what stands before them and are seen by what follows. Padding
    (segment 0) is a segment of its own, so that no row of the mask is empty and its softmax stays finite.
    """
    length = segment_ids.shape[1]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same_segment & jnp.tri(length, dtype=bool)
