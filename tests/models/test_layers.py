"""Norms keep float32 inside, whatever the dtype of the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.models import layers
from tests.conftest import random_params

X = (50 + np.random.default_rng(0).standard_normal((4, 512))).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    "module",
    [layers.LayerNorm(X.shape[-1], eps=1e-6), layers.RMSNorm(eps=1e-6)],
    ids=["LayerNorm", "RMSNorm"],
)
def test_norm_is_float32_under_bfloat16(module):
    params = random_params(module, X)
    normed = jax.jit(module.apply)({"params": params}, X)
    expected = jax.jit(module.apply)({"params": params}, X.astype(np.float32))
    assert normed.dtype == jnp.bfloat16 and expected.dtype == jnp.float32
    np.testing.assert_array_equal(normed, expected.astype(jnp.bfloat16))
