"""Layer normalisation in float32."""

import jax
import jax.numpy as jnp

from alignvlm_jax.shapes import Array, Float


def layer_norm(
    x: Float[Array, "... n"],
    scale: Float[Array, "n"],
    bias: Float[Array, "n"],
    eps: float,
    num_valid: int | None = None,
) -> Float[Array, "... n"]:
    """Returns x normalised over its last axis (arXiv 1607.06450), in float32.

    Args:
      x: of any dtype.
      scale, bias: applied after the normalisation.
      eps: added to the variance.
      num_valid: mean and variance are those of the first `num_valid` entries; None: of all. The
        others are normalised by the same statistics.
    """
    x = x.astype(jnp.float32)
    if num_valid is None or num_valid == x.shape[-1]:
        # In two passes: E[x^2] - E[x]^2 would cancel where the mean is large.
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
    else:
        # Masked and not cut off: the last axis may be sharded, and a slice would move it.
        is_valid = jnp.arange(x.shape[-1]) < num_valid
        centred = x - jnp.where(is_valid, x, 0.0).sum(-1, keepdims=True) / num_valid
        variance = jnp.where(is_valid, jnp.square(centred), 0.0).sum(-1, keepdims=True) / num_valid
    return centred * jax.lax.rsqrt(variance + eps) * scale + bias
