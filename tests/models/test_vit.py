"""The vision encoder against an implementation of its own in NumPy float64, and tiles that do not
see each other."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.models.vit import Siglip
from tests.conftest import random_params

TILES = 4
# Tiles and patches are not square, and eps is large enough to be missed.
CONFIG = VisionConfig(
    tile_height=8,
    tile_width=9,
    patch_height=4,
    patch_width=3,
    width=12,
    mlp_width=20,
    num_layers=2,
    num_heads=2,
    norm_eps=0.05,
    pixel_mean=(0.94, 0.9, 0.81),
    pixel_std=(0.19, 0.3, 0.25),
)
SIGLIP = Siglip(CONFIG, jnp.dtype("float32"), "none")
PIXELS = np.random.default_rng(0).integers(0, 256, (TILES, 8, 9, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def params():
    return random_params(SIGLIP, PIXELS)


def reference(params: dict, pixels: np.ndarray, config: VisionConfig = CONFIG) -> np.ndarray:
    """One tile, patch by patch and head by head, in float64."""
    params = jax.tree.map(np.float64, params)

    def norm(x, weights):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + CONFIG.norm_eps) * weights["scale"] + weights["bias"]

    def attend(x, weights):
        mixed = weights["o"]["bias"]
        for head in range(CONFIG.num_heads):
            query, key, value = (
                x @ weights[n]["kernel"][:, head] + weights[n]["bias"][head] for n in "qkv"
            )
            fractions = np.exp(query @ key.T / math.sqrt(CONFIG.width / CONFIG.num_heads))
            mixed = (
                mixed
                + fractions
                / fractions.sum(-1, keepdims=True)
                @ value
                @ weights["o"]["kernel"][head]
            )
        return mixed

    def mlp(x, weights):
        up = x @ weights["up"]["kernel"] + weights["up"]["bias"]
        if config.gelu == "exact":
            gelu = 0.5 * up * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        else:
            gelu = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        return gelu @ weights["down"]["kernel"] + weights["down"]["bias"]

    kernel = params["patch_embed"]["kernel"]
    bias = params["patch_embed"]["bias"]
    patches = []
    for top in range(0, CONFIG.tile_height, CONFIG.patch_height):
        for left in range(0, CONFIG.tile_width, CONFIG.patch_width):
            patch = pixels[top : top + CONFIG.patch_height, left : left + CONFIG.patch_width] / 255
            patch = (patch - CONFIG.pixel_mean) / CONFIG.pixel_std
            patches.append((patch[..., None] * kernel).sum((0, 1, 2)) + bias)
    x = np.stack(patches) + params["positions"]
    for layer in range(CONFIG.num_layers):
        block = jax.tree.map(lambda array, layer=layer: array[layer], params["blocks"])
        x = x + attend(norm(x, block["attn_norm"]), block["attn"])
        x = x + mlp(norm(x, block["mlp_norm"]), block["mlp"])
    return norm(x, params["final_norm"])


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_equals_float64_reference(mesh, params, gelu):
    config = dataclasses.replace(CONFIG, gelu=gelu)
    siglip = Siglip(config, jnp.dtype("float32"), "none")
    features = jax.jit(lambda params, pixels: siglip.apply({"params": params}, pixels))(
        params, PIXELS
    )
    assert (
        features.shape == (TILES, CONFIG.num_patches, CONFIG.width)
        and features.dtype == jnp.float32
    )
    expected = np.stack([reference(params, pixels, config) for pixels in PIXELS])
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_tiles_are_independent(mesh, params):
    """Every pixel moves its own tile's every patch, and no other tile's."""
    direction = np.random.default_rng(1).standard_normal(CONFIG.width).astype(np.float32)

    @jax.jit
    def influence(params, pixels):
        jacobian = jax.jacrev(lambda pixels: SIGLIP.apply({"params": params}, pixels) @ direction)(
            pixels
        )
        return jnp.abs(jacobian).sum(-1)  # [tile, patch] by [tile, y, x]

    strength = np.asarray(influence(params, PIXELS.astype(np.float32)))
    own = np.eye(TILES, dtype=bool)
    strength = strength.swapaxes(1, 2)
    assert (strength[~own] == 0).all()
    assert strength[own].min() > 1e-6


def test_near_white_stays_distinct_under_bfloat16(params):
    """The difference to a mean near white, taken in bfloat16, would leave a few levels of grey."""
    siglip = Siglip(CONFIG, jnp.dtype("bfloat16"), "none")

    @jax.jit
    def patches(pixels):
        read = []

        def intercept(method, args, kwargs, context):
            if context.module.name == "patch_embed" and context.method_name == "__call__":
                read.append(args[0])
            return method(*args, **kwargs)

        with nn.intercept_methods(intercept):
            siglip.apply({"params": params}, pixels)
        return read[0].astype(jnp.bfloat16).astype(jnp.float32)

    grey = np.arange(256, dtype=np.uint8)
    pixels = np.resize(np.repeat(grey, 3), PIXELS.shape)
    normalised = np.unique(np.asarray(patches(pixels)))
    expected = ((grey[:, None] / 255 - CONFIG.pixel_mean) / CONFIG.pixel_std).ravel()
    near_white = expected[np.abs(expected) < 0.2]
    assert len(near_white) > 10
    for value in near_white:
        assert np.abs(normalised - value).min() < 2**-7 * np.abs(value)
