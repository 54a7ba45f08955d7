"""The H-Reducer against NumPy float64, patch by patch as the release's two convolutions go."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax.models import connectors
from tests.conftest import random_params

TILES = 3
ROWS = 2
COLUMNS = 8
MERGED = 4
E = 6
D = 10
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((TILES * ROWS * COLUMNS, E)).astype(np.float32)
TABLE = RNG.standard_normal((74, D)).astype(np.float32)
CONFIG = config_lib.ModelConfig(
    vision=config_lib.VisionConfig(
        tile_height=ROWS * 2,
        tile_width=COLUMNS * 2,
        patch_height=2,
        patch_width=2,
        width=E,
        num_heads=1,
    ),
    llm=config_lib.LLMConfig(vocab_size=74, width=D),
    connector=config_lib.connector("h_reducer", merged_columns=MERGED),
)
REDUCER = connectors.get("h_reducer")(CONFIG, jnp.dtype("float32"))


def convolve(image: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A convolution [rows, columns, in] whose kernel [4, in, out] and stride are 1 x 4."""
    rows, columns, _ = image.shape
    out = np.zeros((rows, columns // MERGED, kernel.shape[-1]))
    for row, column, x in np.ndindex(rows, columns // MERGED, MERGED):
        out[row, column] += image[row, column * MERGED + x] @ kernel[x]
    return out + bias


def test_equals_float64_reference(mesh):
    params = random_params(REDUCER, FEATURES, TABLE, None)
    output = jax.jit(lambda params: REDUCER.apply({"params": params}, FEATURES, TABLE, None))(
        params
    )
    weights = jax.tree.map(np.float64, params)
    expected = []
    for tile in FEATURES.reshape(TILES, ROWS, COLUMNS, E).astype(np.float64):
        # The release's first convolution has 4 E channels, which then stand side by side as 4
        # positions of E.
        hidden = convolve(
            tile,
            weights["conv1"]["kernel"].reshape(MERGED, E, -1),
            weights["conv1"]["bias"].ravel(),
        )
        hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        merged = convolve(
            hidden.reshape(ROWS, COLUMNS, E), weights["conv2"]["kernel"], weights["conv2"]["bias"]
        )
        expected.append(merged.reshape(-1, E) @ weights["fc"]["kernel"] + weights["fc"]["bias"])
    assert output.tokens.shape == (TILES * CONFIG.tokens_per_tile, D) == (12, D)
    np.testing.assert_allclose(output.tokens, np.concatenate(expected), atol=1e-5)
    np.testing.assert_array_equal(output.patch_nll, np.zeros(len(FEATURES), np.float32))


def test_parameters():
    params = jax.eval_shape(REDUCER.init, jax.random.key(0), FEATURES, TABLE, None)["params"]
    wide = MERGED * E
    assert sum(x.size for x in jax.tree.leaves(params)) == wide**2 + wide + wide * E + E + E * D + D
