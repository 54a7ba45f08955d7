"""LoRA: the factors against plain matrices, what is trained and kept of them, and whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import LoraConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.models.layers import Einsum
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import flops
from alignvlm_jax.train import checkpoint, lora, optim, restore, state, warm_start
from alignvlm_jax.train.checkpoint import Checkpoints
from tests.conftest import random_batch, tiny_config, tiny_connector
from tests.train import fake_run

Q = "llm/blocks/attn/q/kernel"
LORA = LoraConfig(rank=3, alpha=6.0)
ALL = dataclasses.replace(
    LORA, targets=("llm/.*/(attn|mlp)/.*/kernel", "connector/w1/kernel", "vision/patch_embed/kernel")
)  # fmt: skip


def with_lora(rank: LoraConfig = LORA, **changes) -> config_lib.Config:
    config = tiny_config()
    changes = {"trainable": ("connector/.*",), **changes}
    train = dataclasses.replace(config.train, **changes)
    return dataclasses.replace(config, lora=rank, train=train)


def abstract_of(config: config_lib.Config, mesh) -> state.TrainState:
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    return state.abstract_state(vlm.VLM(config.model), config.train, tx, mesh, config.lora)


def drawn(abstract: state.Params, seed: int = 0) -> state.Params:
    """Parameters as after some training: no factor is zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract
    )


# Of each kernel: how many axes of its last ones are inputs, from the einsums of models/.
INPUTS = {
    "llm/blocks/attn/q/kernel": (1, 3),
    "llm/blocks/attn/k/kernel": (1, 3),
    "llm/blocks/attn/v/kernel": (1, 3),
    "llm/blocks/attn/o/kernel": (2, 3),
    "llm/blocks/mlp/gate/kernel": (1, 2),
    "llm/blocks/mlp/up/kernel": (1, 2),
    "llm/blocks/mlp/down/kernel": (1, 2),
    "connector/w1/kernel": (1, 2),
    "vision/patch_embed/kernel": (3, 4),
}


def test_a_merged_kernel_is_the_base_and_a_product_of_plain_matrices(mesh):
    config = with_lora(ALL, trainable=("connector/w2/.*",))
    params = drawn(abstract_of(config, mesh).params)
    leaves = jax.tree.map(np.asarray, state.flatten(params))
    merged = state.flatten(lora.merged(params, ALL.alpha, config.model))
    assert lora.kernels(leaves) == set(INPUTS)
    for path, kernel in leaves.items():
        if lora.is_factor(path):
            assert path not in merged
        elif path not in INPUTS:
            np.testing.assert_array_equal(merged[path], kernel)
        else:
            a, b = (leaves[factor] for factor in lora.factors(path))
            num_inputs, num_axes = INPUTS[path]
            layers = range(len(kernel)) if kernel.ndim > num_axes else [None]
            for i in layers:
                one = slice(None) if i is None else i
                inputs = int(np.prod(kernel[one].shape[:num_inputs]))
                delta = a[one].reshape(inputs, 3) @ b[one].reshape(3, -1)
                expected = kernel[one] + 2.0 * delta.reshape(kernel[one].shape)
                np.testing.assert_allclose(merged[path][one], expected, atol=1e-6, err_msg=path)


def test_merged_logits_are_those_of_factors_beside_their_kernels(mesh):
    """As papers draw it: y = x W + alpha / rank * (x a) b, layer by layer, nothing merged."""
    config = with_lora(ALL, trainable=("connector/w2/.*",))
    model = vlm.VLM(config.model)
    params = jax.tree.map(lambda x: 0.3 * x, drawn(abstract_of(config, mesh).params))
    batch = random_batch(config)
    leaves = state.flatten(params)
    for path in lora.kernels(leaves):
        for factor in lora.factors(path):
            # Beside the kernel, where the scan over layers hands each layer its own.
            leaves[f"{path.removesuffix('kernel')}{factor[-1]}"] = leaves.pop(factor)

    def add_product(method, args, kwargs, context):
        y = method(*args, **kwargs)
        found = isinstance(context.module, Einsum) and context.module.variables.get("params", {})
        if context.method_name != "__call__" or not found or "a" not in found:
            return y
        operands, out = context.module.equation.split("->")
        x, kernel = operands.split(",")
        summed = "".join(letter for letter in kernel if letter not in out)
        kept = "".join(letter for letter in kernel if letter in out)
        between = "".join(letter for letter in x if letter not in summed) + "r"
        narrow = jnp.einsum(f"{x},{summed}r->{between}", args[0], found["a"])
        used.append(context.module.path[-1])
        return y + 2.0 * jnp.einsum(f"{between},r{kept}->{out}", narrow, found["b"])

    used = []
    with nn.intercept_methods(add_product):
        expected = model.apply({"params": state.unflatten(leaves)}, batch).logits
    assert {"q", "k", "v", "o", "gate", "up", "down", "w1", "patch_embed"} == set(used)
    merged = lora.merged(params, ALL.alpha, config.model)
    np.testing.assert_allclose(model.apply({"params": merged}, batch).logits, expected, atol=1e-5)
    base = {name: tree for name, tree in params.items() if name != "lora"}
    before = model.apply({"params": base}, batch).logits
    assert np.abs(np.asarray(before - expected)).max() > 1e-3


def test_factors_start_as_peft_has_them(mesh):
    """a: kaiming_uniform_(a=sqrt(5)) of a weight [r, in], which is uniform within 1 / sqrt(in)."""
    config = with_lora(dataclasses.replace(ALL, rank=64), trainable=("connector/w2/.*",))
    abstract = abstract_of(config, mesh)
    paths = {path for path in state.flatten(abstract.params) if lora.is_factor(path)}
    params = state.init_params(vlm.VLM(config.model), abstract.params, paths, jax.random.key(3))
    leaves = state.flatten(params)
    assert leaves.keys() == paths and all(x.dtype == jnp.float32 for x in leaves.values())
    sizes = {"llm/blocks/attn/o/kernel": 16, "llm/blocks/mlp/down/kernel": 32, Q: 16}
    for path, size in sizes.items():
        a, b = (np.asarray(leaves[factor]) for factor in lora.factors(path))
        assert not b.any() and a.shape[-1] == b.shape[1] == 64
        bound = size**-0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not np.array_equal(a[0], a[1])


def test_state_is_of_the_factors_and_the_connector_alone_and_sharded_as_their_kernels(mesh):
    config = with_lora()
    abstract = abstract_of(config, mesh)
    leaves = state.flatten(abstract.params)
    trained = [path for path in leaves if path.startswith(("connector/", "lora/"))]
    assert state.trainable_paths(config.train, config.stage, abstract.params) == set(trained)
    moments = [x for x in jax.tree.leaves(abstract.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(leaves[path].size for path in trained)
    a, b = (leaves[path] for path in lora.factors(Q))
    assert a.shape == (2, 16, 3) and b.shape == (2, 3, 4, 4)
    # The kernel is [layers, embed, heads, head_dim].
    assert tuple(leaves[Q].sharding.spec) == (None, "fsdp", "tensor", None)
    assert tuple(a.sharding.spec) == (None, "fsdp", None)
    assert tuple(b.sharding.spec) == (None, None, "tensor", None)
    of_b = [x for x in moments if x.shape == b.shape]
    assert of_b and all(x.sharding == b.sharding for x in of_b)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("llm/.*/attn/w/kernel",), r"config.lora.targets 'llm/.*' matches no parameter; did you"),
        (("llm/.*/attn_norm/scale",), "matches llm/blocks/attn_norm/scale, which is no kernel of "),
        (("llm/embed/table",), r"no kernel of a linear map; (did you mean|known)"),
    ],
)
def test_targets_that_are_no_matrices_are_refused_with_the_nearest(mesh, targets, message):
    with pytest.raises(UserError, match=message):
        abstract_of(with_lora(LoraConfig(rank=2, targets=targets)), mesh)


def test_a_convolution_is_no_matrix(mesh):
    config = with_lora(LoraConfig(rank=2, targets=("connector/after/.*/kernel",)))
    model = dataclasses.replace(config.model, connector=tiny_connector("c_abstractor"))
    with pytest.raises(UserError, match="connector/after/conv2/kernel, which is no kernel"):
        abstract_of(dataclasses.replace(config, model=model), mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": (".*",)}, r"trainable matches \S+/kernel, which config.lora.targets gives"),
        (
            {"bfloat16_params": ("connector/.*",)},
            "trainable matches connector/.* and so does config.train.bfloat16_params",
        ),
        ({"bfloat16_params": ("llm/.*", "vison/.*")}, r"'vison/.\*' matches no parameter; did you"),
    ],
)
def test_what_is_trained_must_not_be_frozen(mesh, changes, message):
    with pytest.raises(UserError, match=message):
        abstract_of(with_lora(**changes), mesh)


def test_flops_of_a_step_are_those_of_a_frozen_model_and_of_the_targets():
    """The gradients of kernels without factors are not made."""
    changes = {"llm/.*/attn/(q|v)/kernel": ("llm/.*/attn/(q|v)/kernel", "connector/.*")}
    [trainable] = changes.values()
    config = with_lora()
    plain = dataclasses.replace(
        config, lora=lora.OFF, train=dataclasses.replace(config.train, trainable=trainable)
    )
    whole = dataclasses.replace(plain, train=dataclasses.replace(config.train, trainable=(".*",)))

    def count(one: config_lib.Config) -> float:
        with mesh_lib.use(mesh_lib.single_device()) as mesh:
            params = state.abstract_params(vlm.VLM(one.model), mesh, one.train, one.lora)
            return flops.step_flops(one, params)["llm"]

    # Beside them the products of the factors, and their gradients: of this tiny model a few.
    assert count(plain) < count(config) < 1.05 * count(plain) < count(whole)


def runs(rank: LoraConfig = LORA, second: LoraConfig | None = None, **changes):
    """The stages of `fake_run`, with LoRA."""
    text, pixels = fake_run.stages(**changes)
    text = dataclasses.replace(text, lora=rank, train=dataclasses.replace(text.train, trainable=()))
    trainable = ("connector/.*",)
    pixels = dataclasses.replace(
        pixels,
        lora=rank if second is None else second,
        train=dataclasses.replace(pixels.train, trainable=trainable),
    )
    return text, pixels


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(tmp_path):
    configs = runs(bfloat16_params=("vision/.*", "llm/mlp/.*|llm/blocks/mlp/.*"))
    fake_run.train(tmp_path / "whole", configs=configs)
    with pytest.raises(UserError):
        fake_run.train(
            tmp_path / "parts", fake_run.Batches(fake_run.send(2, at=6)), configs=configs
        )
    fake_run.train(tmp_path / "parts", configs=configs)
    whole, parts = (fake_run.stored(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    # The base is that of the start: both stages trained beside it, and the factors went on.
    first = fake_run.stored(tmp_path / "whole", fake_run.NUM_STEPS)
    base = "['params']['llm']['blocks']['attn']['q']['kernel']"
    np.testing.assert_array_equal(first[base], whole[base])
    b = "['params']['lora']['llm']['blocks']['attn']['q']['kernel']['b']"
    assert first[b].any() and not np.array_equal(first[b], whole[b])
    assert whole["['params']['vision']['blocks']['mlp']['up']['kernel']"].dtype == jnp.bfloat16

    # What is loaded for use is merged, on any mesh.
    mesh = mesh_lib.make_mesh(config_lib.MeshConfig(data=-1), configs[0].model, None)
    _, model, params, step = restore.load_model(tmp_path / "whole", mesh)
    assert step == fake_run.TOTAL and "lora" not in params
    a = whole[b.replace("['b']", "['a']")]
    delta = np.einsum("ldr,lrhk->ldhk", a, whole[b])
    loaded = np.asarray(params["llm"]["blocks"]["attn"]["q"]["kernel"])
    np.testing.assert_allclose(loaded, whole[base] + 2.0 * delta, atol=1e-6)
    assert params["vision"]["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    batch = random_batch(configs[1])
    unmerged = state.unflatten(
        {path[2:-2].replace("']['", "/"): x for path, x in whole.items() if "opt_state" not in path}
    )["params"]
    logits = (
        model.apply({"params": lora.merged(unmerged, LORA.alpha, model.config)}, batch).logits,
        model.apply({"params": params}, batch).logits,
    )
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    "second",
    [lora.OFF, LoraConfig(rank=2, alpha=6.0), LoraConfig(rank=3, alpha=9.0)],
    ids=["none", "another rank", "another alpha"],
)
def test_factors_that_the_next_stage_does_not_have_are_merged_and_not_lost(tmp_path, second):
    first, last = runs(second=second, num_steps=2)
    last = dataclasses.replace(last, train=dataclasses.replace(last.train, num_steps=1))
    fake_run.train(tmp_path / "run", configs=(first, last))
    before, after = (fake_run.stored(tmp_path / "run", step) for step in (2, 3))
    base = "['params']['llm']['blocks']['attn']['q']['kernel']"
    a, b = (before[f"['params']['lora']{base[10:]}['{name}']"] for name in "ab")
    assert b.any()
    expected = before[base] + 2.0 * np.einsum("ldr,lrhk->ldhk", a, b)
    np.testing.assert_allclose(after[base], expected, atol=1e-6)
    assert np.abs(2.0 * np.einsum("ldr,lrhk->ldhk", a, b)).max() > 1e-5
    lora_a = f"['params']['lora']{base[10:]}['a']"
    assert (lora_a in after) == bool(second.rank)
    # Another a, drawn anew: an update is of 2e-3 at most.
    if second.rank == 3:
        assert np.abs(after[lora_a] - a).max() > 0.01


def test_factors_go_with_their_kernels_whatever_the_patterns(mesh, tmp_path):
    """`load` of the LLM alone would else take the kernels and leave what was trained of them."""
    config = with_lora(load=("llm/.*",))
    abstract = abstract_of(config, mesh)
    params = drawn(abstract.params)
    with Checkpoints(tmp_path / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(
            1,
            state.TrainState(np.int32(1), params, ()),
            position={"next_sequence": 0},
            metadata={
                "layout_version": 1,
                "stage": "train",
                "config": config_lib.to_json((config,)),
            },
            metrics=None,
        )
        checkpoints.wait()
        found = warm_start.read(config.train, abstract, checkpoints, 1, config.lora)
        leaves = state.flatten(found.params)
        assert set(lora.factors(Q)) < leaves.keys() and not found.factors
        others = dataclasses.replace(config.train, load=("vision/.*",))
        found = warm_start.read(others, abstract, checkpoints, 1, config.lora)
        assert not lora.kernels(state.flatten(found.params)) and not found.factors


def test_the_reader_of_an_export_merges_in_the_kernels_own_type(mesh):
    config = with_lora(bfloat16_params=("llm/.*",))
    leaves = state.flatten(drawn(abstract_of(config, mesh).params))
    leaves = {path: np.asarray(x) for path, x in leaves.items()}
    read = lora.reader(leaves.__getitem__, leaves, LORA.alpha, config.model)
    a, b = (leaves[factor] for factor in lora.factors(Q))
    expected = leaves[Q].astype(np.float32) + 2.0 * np.einsum("ldr,lrhk->ldhk", a, b)
    assert read(Q).dtype == jnp.bfloat16
    np.testing.assert_array_equal(read(Q), expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(read("llm/embed/table"), leaves["llm/embed/table"])
