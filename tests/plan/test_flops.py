"""FLOPs by the jaxpr against what XLA counts, and what frozen parts save."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import flops, hardware
from alignvlm_jax.train import lora, state
from tests.conftest import random_batch, tiny_config

# Large enough for what is no matrix product to be under a hundredth; unrolled, since XLA counts a
# loop's body once.
VISION = config_lib.VisionConfig(
    tile_height=56,
    tile_width=56,
    patch_height=14,
    patch_width=14,
    width=256,
    mlp_width=1024,
    num_layers=2,
    num_heads=4,
)
LLM = config_lib.LLMConfig(
    vocab_size=2048,
    width=256,
    mlp_width=1024,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
)
BASE = tiny_config(
    model=config_lib.ModelConfig(
        vision=VISION, llm=LLM, image_token_id=4, vocab_impl="plain", scan_unroll=3
    ),
    data=config_lib.DataConfig(seq_len=128, max_tiles=2),
    mesh=config_lib.MeshConfig(),
    train=config_lib.TrainConfig(batch_size=4, patch_token_weight=0.0),
)


SMALL = {
    "perceiver": {"num_latents": 8, "num_layers": 2},
    "ovis": {"visual_vocab_size": 1024},
    "c_abstractor": {"pooled_rows": 2, "pooled_columns": 3, "num_blocks": 2},
}


def with_connector(name: str, **options) -> config_lib.Config:
    model = dataclasses.replace(
        BASE.model, connector=config_lib.connector(name, **SMALL.get(name, {}) | options)
    )
    return dataclasses.replace(BASE, model=model)


def change(part: str, **changes) -> config_lib.Config:
    if part == "train":
        return dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, **changes))
    model = BASE.model
    if part != "model":
        changes = {part: dataclasses.replace(getattr(model, part), **changes)}
    return dataclasses.replace(BASE, model=dataclasses.replace(model, **changes))


CASES = {
    "align": BASE,
    "untied": change("llm", tie_embeddings=False),
    "mlp": with_connector("mlp"),
    "perceiver": with_connector("perceiver"),
    "ovis": with_connector("ovis"),
    "h_reducer": with_connector("h_reducer"),
    "c_abstractor": with_connector("c_abstractor", pooled_columns=2),
    "embeddings_stopped": with_connector("align", embed_grad="stop"),
    "top_k": with_connector("align", top_k=4),
    "vision_frozen": change("train", trainable=("connector/.*", "llm/.*")),
    "connector_only": change("train", trainable=("connector/.*",)),
    "vision_only": change("train", trainable=("vision/.*",)),
    "llm_blocks_only": change("train", trainable=("llm/blocks/.*",)),
    "oracle": change("train", visual_source="oracle", trainable=("llm/.*",)),
}


def abstract_params(config: config_lib.Config) -> state.Params:
    model = vlm.VLM(config.model)
    return sharding.unbox(jax.eval_shape(lambda: vlm.init_params(model, jax.random.key(0))))


def counted(config: config_lib.Config, params: state.Params) -> float:
    """XLA's count of the loss and its gradients, before optimisation."""
    model = vlm.VLM(config.model)
    trainable, frozen = state.split(
        params, state.trainable_paths(config.train, config.stage, params)
    )

    def loss(trainable, frozen, batch):
        merged = state.merge(trainable, frozen)
        losses = model.apply(
            {"params": merged},
            batch,
            visual_source=config.train.visual_source,
            method=vlm.VLM.losses,
        )
        return losses.tokens.nll.sum()

    batch = random_batch(config)
    # Compiled: what no gradient needs is dropped only then.
    compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, frozen, batch).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_within_three_percent_of_the_compiler(config):
    params = abstract_params(config)
    total = sum(flops.step_flops(config, params).values())
    assert total == pytest.approx(counted(config, params) - masked(config), rel=0.03)


def masked(config: config_lib.Config) -> float:
    """FLOPs of the plain program's causal attention over pairs that its mask leaves out: half of
    two matmuls, forward and twice backward."""
    llm = config.model.llm
    pairs = config.train.batch_size * config.data.seq_len**2
    return 0.5 * 3 * llm.num_layers * 2 * 2 * pairs * llm.num_heads * llm.head_dim


def test_causal_attention_counts_half():
    """Of two lengths of a sequence: what grows with the square is half of all pairs."""
    short, long = (
        dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, seq_len=seq_len))
        for seq_len in (128, 256)
    )
    params = abstract_params(BASE)
    of_short, of_long = (flops.step_flops(one, params)["llm"] for one in (short, long))
    assert of_long - 2 * of_short == pytest.approx(masked(long) - 2 * masked(short))


@pytest.mark.parametrize("name", connectors.REGISTRY)
def test_a_connector_alone_is_within_three_percent(name):
    """Forward: in the whole step above it is a small part."""
    connector = config_lib.connector(name, **SMALL.get(name, {}))
    # As wide as a real encoder: of what is no matrix product there is more, the narrower.
    vision = dataclasses.replace(VISION, width=1024)
    model = dataclasses.replace(BASE.model, connector=connector, vision=vision)
    module = connectors.get(name)(model, jnp.dtype("float32"))
    patches = 8 * vision.num_patches
    features, table = (
        jax.ShapeDtypeStruct(shape, "float32") for shape in ((patches, 1024), (2048, 256))
    )
    variables = sharding.unbox(
        jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, None), features, table)
    )
    compiled = (
        jax.jit(lambda *args: module.apply(*args, None)).lower(variables, features, table).compile()
    )
    total = flops.connector_flops(model, num_tiles=8)
    assert total == pytest.approx(compiled.cost_analysis()["flops"], rel=0.03)


@pytest.mark.parametrize("tower", ["llm", "vision"])
def test_factors_of_lora_count_whole(tower):
    """Their product has an axis of layers, as attention has axes of sequences and heads."""
    kernel = f"{tower}/blocks/attn/q/kernel"
    params = state.flatten(abstract_params(BASE))
    a, b = lora.layouts(BASE.model)[kernel].factors(params[kernel].shape)
    rank = 2
    for path, sizes in zip(lora.factors(kernel), (a, b), strict=True):
        params[path] = shape(*(size or rank for size in sizes))
    found = flops.matmul_flops(
        lambda params: lora.merged(params, 4.0, BASE.model), state.unflatten(params)
    )
    assert found[tower] == sum(found.values()) == 2 * rank * math.prod(params[kernel].shape)


def test_parts_of_a_known_model():
    """Forward and backward of Llama 3.2 1B's head over 4 x 128 tokens, by hand: three products of 2
    m n k."""
    parts = flops.step_flops(BASE, abstract_params(BASE))
    assert set(parts) == set(flops.COMPONENTS)
    assert parts["loss"] == 3 * 2 * (4 * 128) * 256 * 2048
    assert parts["connector"] == 3 * 2 * (4 * 2 * 16) * (256 * 256 + 2 * 256 * 2048)


def test_a_frozen_encoder_is_not_gone_back_through():
    frozen = CASES["vision_frozen"]
    whole, part = (flops.step_flops(config, abstract_params(config)) for config in (BASE, frozen))
    assert part["vision"] == pytest.approx(whole["vision"] / 3, rel=0.1)
    assert part["llm"] == whole["llm"]


FORMS = (
    {"remat": "full"},
    {"remat": "dots"},
    {"remat": "qkv+attention"},
    {"vocab_impl": "chunked"},
    {"scan_unroll": 1},
)


@pytest.mark.parametrize("changes", FORMS, ids=str)
@pytest.mark.parametrize("case", ["align", "vision_frozen", "c_abstractor"])
def test_how_it_is_computed_changes_no_count(case, changes):
    """Neither what is computed again in the backward pass, nor blocks that padding fills up."""
    config = CASES[case]
    changed = dataclasses.replace(
        config, model=dataclasses.replace(config.model, chunk_size_mib=0.1, **changes)
    )
    params = abstract_params(config)
    assert flops.step_flops(changed, params) == flops.step_flops(config, params)


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, np.float32)


SQUARE = shape(4, 4)
PRODUCT = 2 * 4**3
FUNCTIONS = {
    "twice": (lambda x: x @ x @ x, 2),
    "dead": (lambda x: (x @ x, x)[1], 0),
    "scan": (lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=5)[0], 5),
    "jit_in_scan": (lambda x: jax.lax.map(jax.jit(lambda y: x @ y), jnp.stack([x, x, x])), 3),
    "largest_branch": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x @ x @ x), 2),
    "while_once": (lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ x, x), 1),
    "gradient": (jax.value_and_grad(lambda x: (x @ x).sum()), 3),
    "recomputed": (jax.value_and_grad(jax.checkpoint(lambda x: jnp.sin(x @ x).sum())), 3),
    "recomputed_in_scan": (
        jax.value_and_grad(lambda x: jax.lax.map(jax.checkpoint(lambda y: jnp.sin(x @ y).sum()), x[None]).sum()), 3
    ),
    "convolution": (lambda x: jax.lax.conv(x[None, None], x[None, None, :3, :3], (1, 1), "SAME"), 2 * 16 * 9 / PRODUCT),
}  # fmt: skip


@pytest.mark.parametrize(("fn", "products"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_what_is_counted_of_a_function(fn, products):
    assert flops.matmul_flops(fn, SQUARE)["connector"] == products * PRODUCT


def test_shards_are_counted_all(mesh):
    def fn(x):
        return jax.shard_map(
            lambda x: x @ x.T,
            in_specs=jax.P("data"),
            out_specs=jax.P("data"),
            axis_names={"data"},
            check_vma=False,
        )(x)

    assert flops.matmul_flops(fn, shape(4, 4))["connector"] == 2 * (2 * 2 * 2 * 4)


class Device:
    def __init__(self, device_kind: str):
        self.device_kind = device_kind


def test_peak():
    assert flops.peak_flops([Device("TPU v5p")] * 4) == 4 * hardware.CHIPS["v5p"].tflops * 1e12
    assert flops.peak_flops([Device("TPU7x")] * 8) == pytest.approx(4 * 2307e12)
    assert flops.peak_flops([Device("TPU v5p"), Device("abacus")]) is None
    assert flops.peak_flops(jax.devices()) is None
    assert set(hardware.KINDS.values()) == set(hardware.CHIPS)


def test_parse_topology():
    assert hardware.parse_topology("v5p:4x4x4").num_chips == 64
    assert hardware.parse_topology("v5e:16x16").num_chips == 256
    assert np.prod([2, 2, 4]) == hardware.parse_topology("v5p:2x2x4").num_chips


def test_mfu(monkeypatch):
    params = abstract_params(BASE)
    assert flops.mfu_of(BASE, params, jax.devices())(3.0, [(1.0, 1.0)]) == {}
    total = sum(flops.step_flops(BASE, params).values())
    batches = [(0.5, 1.0), (0.5, 0.0)]
    values = flops.mfu_of(BASE, params, [Device("TPU v6e")] * 2)(3.0, batches)
    mfu = 3 * total / (2 * 918e12)
    # Half of all tokens, and half of all tiles, are padding.
    assert values == {"mfu": pytest.approx(mfu), "useful_mfu": pytest.approx(mfu / 2)}
