"""ALIGN against NumPy float64, its hull, its start from the LM head, and its vocabulary that no
device holds whole."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.models.connectors.align import Align
from alignvlm_jax.models.connectors.base import PatchLabels
from alignvlm_jax.ops.vocab_average import vocab_logits
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from tests.conftest import random_params, tiny_config

# Sizes that no two axes share, whole or divided by the mesh, so that a shape in the compiled
# program names its axes.
N = 52
E = 6
D = 10
V = 74
K = 3
EPS = 0.05
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((N, E)).astype(np.float32)
TABLE = RNG.standard_normal((V, D)).astype(np.float32)
LABELS = PatchLabels(
    RNG.integers(0, V, (N, K)).astype(np.int32), RNG.random((N, K)).astype(np.float32)
)


def make(dtype: str = "float32", **options) -> Align:
    return Align(
        config_lib.ModelConfig(
            vision=config_lib.VisionConfig(width=E, num_heads=1),
            llm=config_lib.LLMConfig(vocab_size=V, width=D, norm_eps=EPS),
            connector=config_lib.connector(**options),
        ),
        jnp.dtype(dtype),
    )


def run(align: Align, method=None):
    """Parameters with gains other than 1, and the compiled connector or one of its methods."""
    params = random_params(align, FEATURES, TABLE, LABELS)
    return params, jax.jit(
        lambda params, *args: align.apply({"params": params}, *args, method=method)
    )


def layer_norm(x: np.ndarray, weights: dict) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * weights["scale"]
        + weights["bias"]
    )


def reference(params: dict) -> np.ndarray:
    """P in float64."""
    params = jax.tree.map(np.float64, params)
    z = layer_norm(FEATURES @ params["w1"]["kernel"], params["ln1"]) @ params["w2"]["kernel"]
    z = layer_norm(z, params["ln2"]) if "ln2" in params else z
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


@pytest.mark.parametrize("use_ln2", [True, False])
def test_equals_float64_reference(mesh, use_ln2):
    params, align = run(make(use_ln2=use_ln2))
    assert ("ln2" in params) == use_ln2
    output = align(params, FEATURES, TABLE, LABELS)
    weights = reference(params)
    assert output.tokens.dtype == output.patch_nll.dtype == jnp.float32
    np.testing.assert_allclose(output.tokens, weights @ TABLE, atol=1e-5)
    dense = np.zeros((N, V))
    for row, label in np.ndindex(N, K):
        dense[row, LABELS.ids[row, label]] += LABELS.weights[row, label]
    np.testing.assert_allclose(output.patch_nll, -(dense * np.log(weights)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("form", [{"vocab_impl": "plain"}, {"vocab_impl": "chunked"}])
@pytest.mark.parametrize("has_subset", [False, True])
def test_top_k(mesh, form, has_subset):
    """The average is over the likeliest of the subset; the patch loss is as without `top_k`."""
    align = make(top_k=4)
    # Chunks of 7 entries of a shard's 37.
    config = dataclasses.replace(align.config, **form, chunk_size_mib=7 * N // 4 * 4 / 2**20)
    align = align.clone(config=config)
    params = random_params(align, FEATURES, TABLE, LABELS)
    subset = np.arange(V) % 3 != 0
    kept = {"pruning": {"kept_words": subset}} if has_subset else {}
    weights = reference(params) * (subset if has_subset else 1)
    weights /= weights.sum(-1, keepdims=True)
    is_kept = (-weights).argsort(-1).argsort(-1) < 4
    few = np.where(is_kept, weights, 0)
    labels = LABELS._replace(weights=LABELS.weights * (subset[LABELS.ids] if has_subset else 1))
    args = FEATURES, TABLE, labels
    output = jax.jit(lambda params: align.apply({"params": params, **kept}, *args))(params)
    np.testing.assert_allclose(
        output.tokens, few / few.sum(-1, keepdims=True) @ TABLE, rtol=0, atol=1e-5
    )
    whole = align.clone(config=dataclasses.replace(config, connector=config_lib.connector()))
    expected = whole.apply({"params": params, **kept}, *args).patch_nll
    np.testing.assert_allclose(output.patch_nll, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"top_k": V + 1},
            f"top_k is {V + 1}, and the language model's vocabulary has {V} entries",
        ),
        ({"top_k": 2, "weights": "linear"}, "top_k is 2 and weights 'linear'"),
    ],
)
def test_a_top_k_that_does_not_fit_is_refused(options, message):
    config = make(**options).config
    with pytest.raises(UserError, match=message):
        Align.check(config.vision, config.llm, config.connector)


def test_linear_weights_are_the_logits(mesh):
    params, align = run(make(weights="linear"))
    logits = layer_norm(
        layer_norm(FEATURES @ params["w1"]["kernel"], params["ln1"]) @ params["w2"]["kernel"],
        params["ln2"],
    )
    tokens = align(params, FEATURES, TABLE, None).tokens
    np.testing.assert_allclose(tokens, logits / np.sqrt(V) @ TABLE, atol=1e-5)


def test_tokens_lie_in_the_hull_of_the_table(mesh):
    align = make()
    params, probabilities = run(align, Align.probabilities)
    weights = np.asarray(probabilities(params, FEATURES))
    assert weights.dtype == np.float32 and weights.min() >= 0
    np.testing.assert_allclose(weights.sum(-1, dtype=np.float64), 1, atol=1e-5)
    tokens = run(align)[1](params, FEATURES, TABLE, None).tokens
    np.testing.assert_allclose(tokens, weights @ TABLE, atol=1e-5)


def test_distribution_is_float32_under_bfloat16(mesh):
    params, probabilities = run(make(dtype="bfloat16"), Align.probabilities)
    weights = np.asarray(probabilities(params, FEATURES))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1, dtype=np.float64), 1, atol=1e-5)
    np.testing.assert_allclose(weights, reference(params), atol=0.1 * weights.max())


def test_logits_are_not_rounded_under_bfloat16():
    """They are what float64 makes of the same bfloat16 operands.

    Not compiled: XLA may drop a rounding by itself.
    """

    def operand_and_logits(align: Align, features):
        x, head = align._rows_and_head(features)
        return x, vocab_logits(x, head, None)

    align = make(dtype="bfloat16", use_ln2=False)
    params = random_params(align, FEATURES, TABLE, LABELS)
    operand, logits = align.apply({"params": params}, FEATURES, method=operand_and_logits)
    assert operand.dtype == jnp.bfloat16
    expected = np.float64(operand) @ np.float64(params["w2"]["kernel"].astype(jnp.bfloat16))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_without_labels_there_is_no_patch_loss(mesh):
    params, align = run(make())
    np.testing.assert_array_equal(
        align(params, FEATURES, TABLE, None).patch_nll, np.zeros(N, np.float32)
    )


@pytest.mark.parametrize("chunk_size_mib", [64.0, 20 * 4 * N / 2**20])
def test_the_patch_loss_alone_is_that_beside_the_tokens(mesh, chunk_size_mib):
    """All columns at once and 20 at a time; without the matmul by the table."""
    align = make()
    align = align.clone(config=dataclasses.replace(align.config, chunk_size_mib=chunk_size_mib))
    params, whole = run(align)
    _, alone = run(align, Align.patch_nll)
    np.testing.assert_allclose(
        alone(params, FEATURES, LABELS), whole(params, FEATURES, TABLE, LABELS).patch_nll, rtol=1e-6
    )
    flops = [
        fn.lower(*args).compile().cost_analysis()["flops"]
        for fn, args in (
            (alone, (params, FEATURES, LABELS)),
            (whole, (params, FEATURES, TABLE, LABELS)),
        )
    ]
    # Of a device of the mesh.
    assert flops[1] - flops[0] > 2 * N * V * D / mesh.size


def test_ln2_gain_init():
    align = make(ln2_gain_init=4.0)
    variables = jax.jit(align.init)(jax.random.key(0), FEATURES, TABLE, LABELS)
    params = sharding.unbox(variables)["params"]
    np.testing.assert_array_equal(params["ln2"]["scale"], np.full(V, 4.0))
    np.testing.assert_array_equal(params["ln1"]["scale"], np.ones(D))


@pytest.fixture(scope="module")
def gradients():
    """By embed_grad: the compiled gradient of the tokens and the patch losses, on the mesh,
    everything sharded."""

    def compile(embed_grad: str):
        align = make(embed_grad=embed_grad)

        def loss(params, features, table):
            output = align.apply({"params": params}, features, table, LABELS)
            return (output.tokens**2).sum() + output.patch_nll.sum()

        with mesh_lib.use(
            mesh_lib.make_mesh(tiny_config().mesh, tiny_config().model, None)
        ) as mesh:
            boxed = jax.eval_shape(align.init, jax.random.key(0), FEATURES, TABLE, LABELS)["params"]
            params = jax.device_put(
                random_params(align, FEATURES, TABLE, LABELS), sharding.tree_sharding(boxed, mesh)
            )
            args = params, jax.device_put(FEATURES, sharding.batch_sharding(mesh)), TABLE
            return args, jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()

    return {embed_grad: compile(embed_grad) for embed_grad in ("live", "stop")}


@pytest.mark.parametrize("embed_grad", ["live", "stop"])
def test_no_device_holds_all_patches_by_all_words(gradients, embed_grad):
    """Neither [N, V] nor a device's patches by the whole vocabulary, forward or backward."""
    _, compiled = gradients[embed_grad]
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
    }
    assert (N // 4, V // 2) in shapes
    whole = [shape for shape in shapes if V in shape and (N in shape or N // 4 in shape)]
    assert not whole


def test_embed_grad(gradients):
    """ "stop" keeps the connector's gradient from the text table, and nothing else."""
    (args, live) = gradients["live"]
    (_, stop) = gradients["stop"]
    (*live_others, live_table) = live(*args)
    (*stop_others, stop_table) = stop(*args)
    assert np.abs(live_table).max(-1).min() > 1e-3  # every row has a share in every token
    np.testing.assert_array_equal(stop_table, np.zeros_like(TABLE))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        live_others,
        stop_others,
    )
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(stop_others))


def init_w2_and_head(mesh, config: config_lib.Config) -> tuple[jax.Array, jax.Array]:
    """W2 [D, V] and the LM head [D, V] as initialised on the mesh; XLA drops all else."""
    model = vlm.VLM(config.model)

    def init(rng):
        return vlm.init_params(model, rng)

    def w2_and_head(tree):
        head = (
            tree["llm"]["embed"]["table"]
            if config.model.llm.tie_embeddings
            else tree["llm"]["head"]["kernel"]
        )
        return tree["connector"]["w2"]["kernel"], head

    shardings = w2_and_head(sharding.tree_sharding(jax.eval_shape(init, jax.random.key(0)), mesh))
    w2, head = jax.jit(lambda rng: w2_and_head(sharding.unbox(init(rng))), out_shardings=shardings)(
        jax.random.key(0)
    )
    return w2, head.T if config.model.llm.tie_embeddings else head


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_w2_starts_as_the_lm_head(mesh, config, tie_embeddings):
    llm = dataclasses.replace(config.model.llm, tie_embeddings=tie_embeddings)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))
    w2, head = init_w2_and_head(mesh, config)
    assert w2.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert np.std(w2) > 0.1
    np.testing.assert_array_equal(w2, head)


def test_w2_random(mesh, config):
    connector = config_lib.connector(w2_init="random")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, connector=connector)
    )
    w2, head = init_w2_and_head(mesh, config)
    assert not vlm.llm_derived_paths(config.model, {})
    assert abs(np.corrcoef(np.ravel(w2), np.ravel(head))[0, 1]) < 0.3
    assert np.std(w2) == pytest.approx(config.model.llm.width**-0.5, rel=0.2)


def test_w2_is_copied_again(config):
    """At the start of a stage the head may have come from a checkpoint: W2 follows it, in a buffer
    of its own."""
    llm = dataclasses.replace(config.model.llm, tie_embeddings=False)
    model = vlm.VLM(dataclasses.replace(config.model, llm=llm))
    params = jax.tree.map(
        jnp.asarray,
        random_params(
            model, vlm.abstract_batch(config.model, config.data, config.train.batch_size)
        ),
    )
    copied = vlm.with_llm_derived(config.model, params)
    head = params["llm"]["head"]["kernel"]
    w2 = copied["connector"]["w2"]["kernel"]
    np.testing.assert_array_equal(w2, head)
    assert w2.unsafe_buffer_pointer() != head.unsafe_buffer_pointer()
    others = {**copied, "connector": {**copied["connector"], "w2": params["connector"]["w2"]}}
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params, others))


def test_a_head_of_another_size(config):
    params = random_params(
        vlm.VLM(config.model),
        vlm.abstract_batch(config.model, config.data, config.train.batch_size),
    )
    params["llm"]["embed"]["table"] = np.zeros((30, 16), np.float32)
    with pytest.raises(UserError, match=r"\(16, 32\).*\(16, 30\)"):
        vlm.with_llm_derived(config.model, params)


def test_unknown_connector_names_the_nearest():
    with pytest.raises(
        UserError, match=r"config.model.connector.name is 'algin'; did you mean 'align'\?"
    ):
        connectors.get("algin")
