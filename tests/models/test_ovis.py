"""Ovis against NumPy float64, in both forms, and its hull."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import connectors
from alignvlm_jax.models.connectors.base import PatchLabels
from tests.conftest import random_params

N = 12
E = 6
D = 10
K = 22
V = 74
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((N, E)).astype(np.float32)
TEXT_TABLE = RNG.standard_normal((V, D)).astype(np.float32)
LABELS = PatchLabels(np.zeros((N, 2), np.int32), np.ones((N, 2), np.float32))


def make(top_k: int = 0, **options):
    config = config_lib.ModelConfig(
        vision=config_lib.VisionConfig(width=E, num_heads=1),
        llm=config_lib.LLMConfig(vocab_size=V, width=D),
        connector=config_lib.connector("ovis", visual_vocab_size=K, top_k=top_k),
        **options,
    )
    return connectors.get("ovis")(config, jnp.dtype("float32"))


@pytest.mark.parametrize(
    "form", [{"vocab_impl": "plain"}, {"vocab_impl": "chunked", "chunk_size_mib": 1e-4}]
)
@pytest.mark.parametrize("top_k", [0, 3])
def test_equals_float64_reference(mesh, form, top_k):
    ovis = make(top_k, **form)
    params = random_params(ovis, FEATURES, TEXT_TABLE, LABELS)
    output = jax.jit(lambda params: ovis.apply({"params": params}, FEATURES, TEXT_TABLE, LABELS))(
        params
    )
    weights = jax.tree.map(np.float64, params)
    logits = FEATURES @ weights["head"]["kernel"]
    logits = (logits - logits.mean(-1, keepdims=True)) / np.sqrt(
        logits.var(-1, keepdims=True) + 1e-5
    )
    exp = np.exp(logits * weights["norm"]["scale"] + weights["norm"]["bias"])
    exp = np.where((-exp).argsort(-1).argsort(-1) < (top_k or K), exp, 0)
    np.testing.assert_allclose(
        output.tokens, exp / exp.sum(-1, keepdims=True) @ weights["table"], atol=1e-5
    )
    np.testing.assert_array_equal(output.patch_nll, np.zeros(N, np.float32))


def test_a_top_k_beyond_the_table_is_refused():
    config = make(top_k=K + 1).config
    with pytest.raises(UserError, match=f"top_k is {K + 1}, and the learned table has {K} entries"):
        connectors.get("ovis").check(config.vision, config.llm, config.connector)


def test_parameters():
    """Table from N(0, 1), as nn.Embedding draws it; no bias but LN's."""
    params = jax.eval_shape(make().init, jax.random.key(0), FEATURES, TEXT_TABLE, None)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == E * K + 2 * K + K * D
    drawn = jax.jit(make().init)(jax.random.key(0), FEATURES, TEXT_TABLE, None)["params"][
        "table"
    ].unbox()
    assert np.std(drawn) == pytest.approx(1, abs=0.15)
