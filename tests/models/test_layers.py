"""Norms keep float32 inside, whatever the dtype of the computation; linear maps are einsums, on CPU
matmuls that copy nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.models import layers
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import hardware
from tests.conftest import matmul_dtypes, random_params, tiny_config

X = (50 + np.random.default_rng(0).standard_normal((4, 512))).astype(jnp.bfloat16)


@pytest.mark.parametrize(
    "module",
    [layers.LayerNorm(X.shape[-1], eps=1e-6), layers.RMSNorm(eps=1e-6)],
    ids=["LayerNorm", "RMSNorm"],
)
def test_norm_is_float32_under_bfloat16(module):
    params = random_params(module, X)
    normed = jax.jit(module.apply)({"params": params}, X)
    expected = jax.jit(module.apply)({"params": params}, X.astype(np.float32))
    assert normed.dtype == jnp.bfloat16 and expected.dtype == jnp.float32
    np.testing.assert_array_equal(normed, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("equation", "inputs", "kernel"),
    [
        ("BTD,DHh->BTHh", (2, 5, 6), (6, 3, 4)),
        ("BTHh,HhD->BTD", (2, 5, 3, 4), (3, 4, 6)),
        ("BPyxC,yxCE->BPE", (2, 5, 2, 3, 4), (2, 3, 4, 6)),
        ("NxE,xEyF->NyF", (5, 2, 3), (2, 3, 4, 6)),
        # No matmul: what is summed does not lie at the end.
        ("BDT,DF->BTF", (2, 6, 5), (6, 4)),
    ],
)
def test_linear_is_the_einsum(equation, inputs, kernel):
    """Of whole numbers, so that sums of any order are equal."""
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-9, 9, shape).astype(np.float32) for shape in (inputs, kernel))
    expected, pull = jax.vjp(functools.partial(jnp.einsum, equation), x, w)
    with mesh_lib.use(mesh_lib.single_device()):
        ours, our_pull = jax.vjp(functools.partial(layers.linear, equation), x, w)
    for result, wanted in zip((ours, *our_pull(ours)), (expected, *pull(expected)), strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_a_kernels_gradient_copies_nothing_on_cpu():
    """The gradient of the outputs is read as it lies."""
    x = np.ones((4, 32, 16), np.float32)
    w = np.ones((16, 3, 8), np.float32)

    def gradient(w, dout):
        return jax.vjp(functools.partial(layers.linear, "BTD,DHh->BTHh", x), w)[1](dout)[0]

    with mesh_lib.use(mesh_lib.single_device()):
        lowered = jax.jit(gradient).lower(w, np.ones((4, 32, 3, 8), np.float32))
    assert " copy(" not in lowered.compile().as_text()


def test_bfloat16_is_multiplied_as_such_on_cpu():
    """Forward and backward, with sums in float32: what CPUs have an instruction for. XLA would take
    both operands to float32 for a result in bfloat16."""
    x = np.ones((4, 32, 16), jnp.bfloat16)
    w = np.ones((16, 3, 8), jnp.bfloat16)
    fn = functools.partial(layers.linear, "BTD,DHh->BTHh")
    with mesh_lib.use(mesh_lib.single_device()):
        assert fn(x, w).dtype == jnp.bfloat16
        assert fn(x, w, out_dtype=jnp.float32).dtype == jnp.float32
        text = jax.jit(lambda x, w: jax.vjp(fn, x, w)[1](fn(x, w))).lower(x, w).as_text()
    assert matmul_dtypes(text) == [("bf16", "bf16", "f32")] * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_results_of_matmuls_are_saved(dtype, reduce_dtype):
    """By the policy "dots", which sees no matmul within a derivative of our own."""
    module = layers.Einsum("BTD,DE->BTE", (16, 16), ("embed", "mlp"), dtype=dtype)
    x = np.ones((4, 32, 16), np.float32)
    params = random_params(module, x)

    def count(remat: str) -> int:
        def layer(params, x):
            return jnp.sin(module.apply({"params": params}, jnp.sin(x)))

        kept = jax.checkpoint(layer, policy=layers.REMAT_POLICIES[remat])

        def loss(params, x):
            with layers.gradients_reduced_in(reduce_dtype):
                return kept(params, kept(params, x)).astype(jnp.float32).sum()

        with mesh_lib.use(mesh_lib.single_device()):
            return len(matmul_dtypes(jax.jit(jax.grad(loss, (0, 1))).lower(params, x).as_text()))

    assert count("dots") == 2 * 3 < count("full")


# Gradients of kernels, and the type in which devices add them up.

KERNEL = layers.Einsum(
    "BTD,DHh->BTHh", (16, 4, 8), ("embed", "heads", "head_dim"), True, dtype=jnp.bfloat16
)
WHOLE = np.random.default_rng(0).integers(-9, 9, (8, 32, 16)).astype(np.float32)
OUT = np.random.default_rng(1).integers(-9, 9, (8, 32, 4, 8)).astype(np.float32)


def gradient(module: layers.Einsum, dtype: str, mesh) -> jax.stages.Compiled:
    """The gradient by the parameters of <module(x), OUT>: its exact value is one of whole numbers,
    as large as 32 x 8 x 81, of which bfloat16 holds those below 256."""
    with mesh_lib.use(mesh):
        boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), WHOLE))
        shardings = sharding.tree_sharding(boxed, mesh)
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            sharding.unbox(boxed),
            shardings,
        )
        batch = sharding.batch_sharding(mesh)
        x = jax.ShapeDtypeStruct(WHOLE.shape, WHOLE.dtype, sharding=batch)
        out = jax.ShapeDtypeStruct(OUT.shape, OUT.dtype, sharding=batch)

        def loss(params, x, out):
            with layers.gradients_reduced_in(dtype):
                return (module.apply(params, x).astype(jnp.float32) * out).sum()

        return (
            jax.jit(jax.grad(loss, (0, 1)), out_shardings=(shardings, batch))
            .lower(params, x, out)
            .compile()
        )


def test_kernels_gradients_are_summed_in_float32_where_that_is_chosen():
    """Of whole numbers, whose sums float32 holds exactly, on data 2 x fsdp 2 x tensor 2."""
    sizes = config_lib.MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = mesh_lib.make_mesh(sizes, tiny_config().model, None)
    drawn = {"params": random_params(KERNEL, WHOLE)}

    def run(module, dtype):
        compiled = gradient(module, dtype, mesh)
        args = (drawn, WHOLE, OUT)
        put = jax.tree.map(jax.device_put, args, compiled.input_shardings[0])
        return jax.device_get(compiled(*put))

    expected = np.einsum("BTD,BTHh->DHh", WHOLE, OUT)
    rounded, dinputs = run(KERNEL, "bfloat16")
    exact, dinputs_of_exact = run(KERNEL, "float32")
    np.testing.assert_array_equal(exact["params"]["kernel"], expected)
    assert exact["params"]["kernel"].dtype == np.float32
    error = np.abs(rounded["params"]["kernel"] - expected).max()
    assert 1 <= error < 2**-7 * np.abs(expected).max()
    # The other gradients are what they were.
    np.testing.assert_array_equal(dinputs_of_exact, dinputs)
    # In float32 there is nothing to choose.
    of_float32 = [run(KERNEL.copy(dtype=jnp.float32), dtype) for dtype in ("bfloat16", "float32")]
    jax.tree.map(np.testing.assert_array_equal, *of_float32)


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
@pytest.mark.parametrize(("dtype", "sent"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_what_a_tpu_sends_of_a_kernels_gradient(dtype, sent):
    """CPU's compiler makes all sums float32, of what was rounded before; the TPU's does not."""
    devices = hardware.compile_only_devices(hardware.parse_topology("v5e:2x2"))
    sizes = config_lib.MeshConfig(data=1, fsdp=2, tensor=2)
    mesh = mesh_lib.make_mesh(sizes, tiny_config().model, None, devices)
    text = gradient(KERNEL, dtype, mesh).as_text()
    # Of tensor a shard, [16, 2, 8]; half of it where it is scattered; [4, 32, 16] are the inputs'.
    reduced = re.findall(
        r"= \(?(\w+)\[([\d,]+)\]\S* (?:all-reduce|reduce-scatter|collective-permute)", text
    )
    sizes = [(kind, np.prod([int(n) for n in shape.split(",")])) for kind, shape in reduced]
    assert [kind for kind, size in sizes if size in (256, 128)] == [sent], reduced
