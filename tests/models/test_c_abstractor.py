"""The C-Abstractor against NumPy float64, position by position."""

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax.models import connectors
from tests.conftest import random_params

TILES = 2
ROWS = 3
COLUMNS = 5
POOLED = (2, 3)
BLOCKS = 2
E = 8
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
    connector=config_lib.connector(
        "c_abstractor", pooled_rows=POOLED[0], pooled_columns=POOLED[1], num_blocks=BLOCKS
    ),
)
ABSTRACTOR = connectors.get("c_abstractor")(CONFIG, jnp.dtype("float32"))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def layer_norm(x: np.ndarray, weights: dict) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weights[
        "scale"
    ] + weights["bias"]


def linear(x: np.ndarray, weights: dict) -> np.ndarray:
    return x @ weights["kernel"] + weights.get("bias", 0)


def depthwise(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    rows, columns, _ = image.shape
    out = np.zeros_like(image)
    for row, column, i, j in np.ndindex(rows, columns, 3, 3):
        if 0 <= row + i - 1 < rows and 0 <= column + j - 1 < columns:
            out[row, column] += image[row + i - 1, column + j - 1] * kernel[i, j]
    return out


def blocks(image: np.ndarray, stacked: dict) -> np.ndarray:
    for index in range(BLOCKS):
        block = jax.tree.map(lambda array, index=index: array[index], stacked)
        hidden = silu(layer_norm(linear(image, block["conv1"]), block["norm1"]))
        hidden = silu(layer_norm(depthwise(hidden, block["conv2"]["kernel"]), block["norm2"]))
        gate = linear(silu(linear(hidden.mean((0, 1)), block["gate"]["down"])), block["gate"]["up"])
        image = silu(
            image + layer_norm(linear(hidden * sigmoid(gate), block["conv3"]), block["norm3"])
        )
    return image


def pool(image: np.ndarray) -> np.ndarray:
    """3 x 5 to 2 x 3 by hand: bins overlap by a row, and by a column where 5 / 3 ends within
    one."""
    rows = ((0, 2), (1, 3))
    columns = ((0, 2), (1, 4), (3, 5))
    return np.array([[image[a:b, c:d].mean((0, 1)) for c, d in columns] for a, b in rows])


def test_equals_float64_reference(mesh):
    params = random_params(ABSTRACTOR, FEATURES, TABLE, None)
    output = jax.jit(lambda params: ABSTRACTOR.apply({"params": params}, FEATURES, TABLE, None))(
        params
    )
    weights = jax.tree.map(np.float64, params)
    expected = []
    for tile in FEATURES.reshape(TILES, ROWS, COLUMNS, E).astype(np.float64):
        image = blocks(tile + weights["positions"].reshape(ROWS, COLUMNS, E), weights["before"])
        image = blocks(pool(image), weights["after"]).reshape(-1, E)
        expected.append(linear(silu(linear(image, weights["fc1"])), weights["fc2"]))
    assert output.tokens.shape == (TILES * CONFIG.tokens_per_tile, D) == (12, D)
    np.testing.assert_allclose(output.tokens, np.concatenate(expected), atol=1e-4)
    np.testing.assert_array_equal(output.patch_nll, np.zeros(len(FEATURES), np.float32))


def test_parameters():
    params = jax.eval_shape(ABSTRACTOR.init, jax.random.key(0), FEATURES, TABLE, None)["params"]
    gate = 2 * E * (E // 4) + E + E // 4
    block = 2 * E**2 + 9 * E + gate + 3 * 2 * E
    readout = E * D + D + D**2 + D
    assert (
        sum(x.size for x in jax.tree.leaves(params))
        == ROWS * COLUMNS * E + 2 * BLOCKS * block + readout
    )
