"""The MLP connector against NumPy float64, behind the interface that ALIGN has."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax.models import connectors
from alignvlm_jax.models.connectors.base import ConnectorOutput, PatchLabels
from tests.conftest import random_params

N = 12
E = 6
D = 10
V = 74
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((N, E)).astype(np.float32)
TABLE = RNG.standard_normal((V, D)).astype(np.float32)
LABELS = PatchLabels(np.zeros((N, 2), np.int32), np.ones((N, 2), np.float32))


def test_equals_float64_reference(mesh):
    config = config_lib.ModelConfig(
        vision=config_lib.VisionConfig(width=E, num_heads=1),
        llm=config_lib.LLMConfig(vocab_size=V, width=D),
    )
    mlp = connectors.get("mlp")(config, jnp.dtype("float32"))
    params = random_params(mlp, FEATURES, TABLE, LABELS)
    output = jax.jit(lambda params: mlp.apply({"params": params}, FEATURES, TABLE, LABELS))(params)
    weights = jax.tree.map(np.float64, params)
    hidden = FEATURES @ weights["fc1"]["kernel"] + weights["fc1"]["bias"]
    hidden *= 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = hidden @ weights["fc2"]["kernel"] + weights["fc2"]["bias"]
    assert isinstance(output, ConnectorOutput)
    np.testing.assert_allclose(output.tokens, expected, atol=1e-5)
    np.testing.assert_array_equal(output.patch_nll, np.zeros(N, np.float32))
