"""The Perceiver Resampler against NumPy float64, and what a latent may read."""

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax.models import connectors
from tests.conftest import random_params

TILES = 3
P = 8
M = 5
LAYERS = 2
HEADS = 2
E = 6
D = 10
EPS = 0.05
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((TILES * P, E)).astype(np.float32)
TABLE = RNG.standard_normal((74, D)).astype(np.float32)
CONFIG = config_lib.ModelConfig(
    vision=config_lib.VisionConfig(
        tile_height=4,
        tile_width=8,
        patch_height=2,
        patch_width=2,
        width=E,
        num_heads=HEADS,
        norm_eps=EPS,
    ),
    llm=config_lib.LLMConfig(vocab_size=74, width=D),
    connector=config_lib.connector("perceiver", num_latents=M, num_layers=LAYERS),
)
PERCEIVER = connectors.get("perceiver")(CONFIG, jnp.dtype("float32"))


def layer_norm(x: np.ndarray, weights: dict) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS) * weights[
        "scale"
    ] + weights["bias"]


def attend(latents: np.ndarray, patches: np.ndarray, weights: dict) -> np.ndarray:
    """Of one tile, head by head."""
    latents = layer_norm(latents, weights["latents_norm"])
    patches = layer_norm(patches, weights["patches_norm"])
    read = np.concatenate([patches, latents])
    out = 0
    for head in range(HEADS):
        query, key, value = (
            x @ weights[name]["kernel"][:, head]
            for name, x in (("q", latents), ("k", read), ("v", read))
        )
        scores = np.exp(query @ key.T / np.sqrt(E // HEADS))
        out = out + scores / scores.sum(-1, keepdims=True) @ value @ weights["o"]["kernel"][head]
    return out


def reference(params: dict) -> np.ndarray:
    weights = jax.tree.map(np.float64, params)
    tokens = []
    for patches in FEATURES.reshape(TILES, P, E).astype(np.float64):
        x = weights["latents"]
        for index in range(LAYERS):
            layer = jax.tree.map(lambda array, index=index: array[index], weights["layers"])
            x = x + attend(x, patches, layer["attn"])
            hidden = layer_norm(x, layer["mlp"]["norm"]) @ layer["mlp"]["up"]["kernel"]
            x = x + np.maximum(hidden, 0) ** 2 @ layer["mlp"]["down"]["kernel"]
        tokens.append(layer_norm(x, weights["final_norm"]) @ weights["proj"]["kernel"])
    return np.concatenate(tokens)


def test_equals_float64_reference(mesh):
    params = random_params(PERCEIVER, FEATURES, TABLE, None)
    output = jax.jit(lambda params: PERCEIVER.apply({"params": params}, FEATURES, TABLE, None))(
        params
    )
    assert output.tokens.shape == (TILES * CONFIG.tokens_per_tile, D) == (15, D)
    np.testing.assert_allclose(output.tokens, reference(params), atol=1e-4)
    np.testing.assert_array_equal(output.patch_nll, np.zeros(TILES * P, np.float32))


def test_parameters():
    params = jax.eval_shape(PERCEIVER.init, jax.random.key(0), FEATURES, TABLE, None)["params"]
    layer = 4 * E**2 + 2 * 2 * E + 2 * 4 * E**2 + 2 * E
    assert sum(x.size for x in jax.tree.leaves(params)) == M * E + LAYERS * layer + 2 * E + E * D
