"""Cross-entropy over a vocabulary that may be sharded, as (sum, weight)."""

import jax
import jax.numpy as jnp

from alignvlm_jax.shapes import Array, Float, Int


def pick(logits: Float[Array, "... V"], ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns logits[..., ids]. A masked sum stays where the logits are and fuses with their other sums; what a gather
    along a sharded vocabulary costs is left to the partitioner."""
    vocabulary = jax.lax.broadcasted_iota(ids.dtype, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(vocabulary == ids[..., None], logits, 0.0), axis=-1)


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted sum of -log softmax(logits)[targets], in nats, and the sum of the weights.

    The caller divides once, after adding up micro-batches and hosts: a mean of means would weigh short answers more.
    """
    logits = logits.astype(jnp.float32)
    losses = jax.nn.logsumexp(logits, axis=-1) - pick(logits, targets)
    return jnp.sum(losses * weights), jnp.sum(weights)


def soft_cross_entropy(
    logits: Float[Array, "N V"], label_ids: Int[Array, "N k"], label_weights: Float[Array, "N k"]
) -> Float[Array, "N"]:
    """Returns -sum_k weight_k log softmax(logits)[id_k] of each row, in nats: the loss of patch-token supervision.

    Takes k logits and one log-sum-exp a row, and makes nothing of size [N, V] but what is fused into those sums.
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.stack([pick(logits, label_ids[:, j]) for j in range(label_ids.shape[1])], axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) * label_weights.sum(-1) - (picked * label_weights).sum(-1)
