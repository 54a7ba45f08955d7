"""Norms keep float32 inside, whatever the dtype of the computation; linear maps are einsums, on CPU
matmuls that copy nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.models import layers
from alignvlm_jax.parallel import mesh as mesh_lib
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


@pytest.mark.parametrize(
    ("equation", "inputs", "kernel"),
    [
        ("BTD,DHh->BTHh", (2, 5, 6), (6, 3, 4)),
        ("BTHh,HhD->BTD", (2, 5, 3, 4), (3, 4, 6)),
        ("BPyxC,yxCE->BPE", (2, 5, 2, 3, 4), (2, 3, 4, 6)),
        ("NxE,xEyF->NyF", (5, 2, 3), (2, 3, 4, 6)),
        # No matmul: what is summed does not lie at the end.
        ("BDT,DF->BTF", (2, 6, 5), (6, 4)),
    ],
)
def test_linear_is_the_einsum(equation, inputs, kernel):
    """Of whole numbers, so that sums of any order are equal."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-9, 9, shape).astype(np.float32) for shape in (inputs, kernel))
    expected, pull = jax.vjp(functools.partial(jnp.einsum, equation), x, w)
    with mesh_lib.use(mesh_lib.single_device()):
        ours, our_pull = jax.vjp(functools.partial(layers.linear, equation), x, w)
    for result, wanted in zip((ours, *our_pull(ours)), (expected, *pull(expected)), strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_a_kernels_gradient_copies_nothing_on_cpu():
    """The gradient of the outputs is read as it lies."""
    x = np.ones((4, 32, 16), np.float32)
    w = np.ones((16, 3, 8), np.float32)

    def gradient(w, dout):
        return jax.vjp(functools.partial(layers.linear, "BTD,DHh->BTHh", x), w)[1](dout)[0]

    with mesh_lib.use(mesh_lib.single_device()):
        lowered = jax.jit(gradient).lower(w, np.ones((4, 32, 3, 8), np.float32))
    assert " copy(" not in lowered.compile().as_text()
