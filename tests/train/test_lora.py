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
from alignvlm_jax.train import lora, state, step
from tests.conftest import random_batch, tiny_connector
from tests.train.lora_states import ALL, LORA, Q, abstract_of, drawn, with_lora

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


def test_factors_are_not_merged_by_an_alpha_that_nobody_gave(mesh):
    config = with_lora()
    params = drawn(abstract_of(config, mesh).params)
    with pytest.raises(ValueError, match="no lora_alpha was given"):
        step.whole_loss(vlm.VLM(config.model), config.train, params, {})


def test_factors_start_as_peft_has_them(mesh):
    """a: kaiming_uniform_(a=sqrt(5)) of a weight [r, in], which is uniform within 1 / sqrt(in)."""
    config = with_lora(dataclasses.replace(ALL, rank=16), trainable=("connector/w2/.*",))
    abstract = abstract_of(config, mesh)
    paths = {path for path in state.flatten(abstract.params) if lora.is_factor(path)}
    model = vlm.VLM(config.model)
    keys = [jax.random.key(seed) for seed in (3, 4, 5, 6)]
    draws = [state.flatten(state.init_params(model, abstract.params, paths, key)) for key in keys]
    assert draws[0].keys() == paths and all(x.dtype == jnp.float32 for x in draws[0].values())
    sizes = {"llm/blocks/attn/o/kernel": 16, "llm/blocks/mlp/down/kernel": 32, Q: 16}
    for path, size in sizes.items():
        a, b = (
            np.stack([np.asarray(leaves[factor]) for leaves in draws])
            for factor in lora.factors(path)
        )
        assert not b.any() and a.shape[-1] == b.shape[2] == 16
        bound = size**-0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not np.array_equal(a[0, 0], a[0, 1])


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
        ((".*",), "matches connector/ln1/bias, which is no kernel"),
        (("llm/.*/attn/(q|v/kernel",), "is not a regular expression: missing"),
    ],
)
def test_targets_that_are_no_matrices_are_refused_with_the_nearest(mesh, targets, message):
    with pytest.raises(UserError, match=message):
        abstract_of(with_lora(LoraConfig(rank=2, targets=targets)), mesh)


def test_a_rank_that_no_target_can_have_is_refused(mesh):
    """Else 1e6 in place of 16 is found when memory runs out."""
    narrow = ("llm/.*/attn/(q|k)/kernel",)
    with pytest.raises(UserError, match=r"rank is 17, and no .* more than 16, of llm/blocks/attn/"):
        abstract_of(with_lora(LoraConfig(rank=17, targets=narrow)), mesh)
    # Keys have fewer outputs than that, which is no reason to refuse it of queries.
    leaves = state.flatten(abstract_of(with_lora(LoraConfig(rank=16, targets=narrow)), mesh).params)
    assert leaves["lora/llm/blocks/attn/k/kernel/b"].shape == (2, 16, 2, 4)


def test_a_convolution_is_no_matrix(mesh):
    config = with_lora(LoraConfig(rank=2, targets=("connector/after/.*/kernel",)))
    model = dataclasses.replace(config.model, connector=tiny_connector("c_abstractor"))
    with pytest.raises(UserError, match="connector/after/conv2/kernel, which is no kernel"):
        abstract_of(dataclasses.replace(config, model=model), mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainable": (".*",)},
            r"trainable matches llm/\S+/kernel, and so does config.lora.targets.*'connector/.\*'",
        ),
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_kernel_is_no_narrower_than_what_the_model_computes_in(mesh, dtype):
    """A small product would be lost in the rounding of a kernel that is held in bfloat16."""
    config = with_lora(bfloat16_params=("llm/.*",))
    model = dataclasses.replace(config.model, dtype=dtype)
    params = drawn(abstract_of(config, mesh).params)
    leaves = {path: np.asarray(x) for path, x in state.flatten(params).items()}
    read = lora.reader(leaves.__getitem__, leaves, LORA.alpha, model)
    a, b = (leaves[factor] for factor in lora.factors(Q))
    expected = leaves[Q].astype(np.float32) + 2.0 * np.einsum("ldr,lrhk->ldhk", a, b)
    np.testing.assert_array_equal(read("llm/embed/table"), leaves["llm/embed/table"])
    on_devices = state.flatten(lora.merge(jax.device_put(params), LORA.alpha, model))
    abstract = state.abstract_merged(abstract_of(config, mesh).params, model)
    as_planned = state.flatten(abstract)
    assert {path: x.dtype for path, x in on_devices.items()} == {
        path: x.dtype for path, x in as_planned.items()
    }
    for kernel in (read(Q), on_devices[Q]):
        assert kernel.dtype == dtype
        tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
        np.testing.assert_allclose(kernel.astype(np.float32), expected, rtol=tolerance, atol=1e-6)
    assert on_devices["llm/embed/table"].dtype == jnp.bfloat16
