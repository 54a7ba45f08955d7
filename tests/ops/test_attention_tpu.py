"""Splash attention through the TPU's own compiler, for chips that are not here; needs libtpu, which
only compiles."""

import dataclasses
import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from alignvlm_jax import config as config_lib
from alignvlm_jax.inference import sampler
from alignvlm_jax.models import vlm
from alignvlm_jax.ops import attention
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import state
from tests.conftest import tiny_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)

# Two processes would otherwise abort over libtpu's lock file, and pytest-xdist starts several.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Nor is there a cloud machine to ask what it has.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

MESH = config_lib.MeshConfig(data=1, fsdp=2, tensor=2)
HEADS = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor", None)


@pytest.fixture
def tpu():
    """A mesh of four chips, entered."""
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    with mesh_lib.use(mesh_lib.make_mesh(MESH, tiny_config().model, None, devices)) as mesh:
        yield mesh


def compile_gradients(
    mesh, kernel: str, length: int, heads: int, kv_heads: int, head_dim: int, causal: bool
):
    """The program of the output and its gradients; packed sequences where causal."""
    rows = 4
    by_heads = jax.NamedSharding(mesh, HEADS)
    query, key, value = (
        jax.ShapeDtypeStruct((rows, length, n, head_dim), jnp.bfloat16, sharding=by_heads)
        for n in (heads, kv_heads, kv_heads)
    )
    ids = (
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
        if causal
        else None
    )

    def run(query, key, value, ids):
        mixed = functools.partial(
            attention.self_attention, segment_ids=ids, causal=causal, kernel=kernel
        )
        output, backward = jax.vjp(mixed, query, key, value)
        return output, *backward(output)

    return jax.jit(run, out_shardings=by_heads).lower(query, key, value, ids).compile().as_text()


def is_square(text: str, *lengths: int) -> bool:
    """Whether an array of the program has two axes as long as a row."""
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)}
    return any(sum(size in lengths for size in shape) >= 2 for shape in shapes)


SIZES = {
    "head_dim_64": (1536, 8, 4, 64, True),
    "head_dim_128": (1536, 8, 2, 128, True),
    "so400m": (729, 16, 16, 72, False),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_splash_compiles(tpu, sizes):
    """ "auto" takes it on this mesh: three kernels, no logits of T x T, and nothing is gathered."""
    assert attention.mesh_platform() == "tpu"
    length = sizes[0]
    text = compile_gradients(tpu, "auto", *sizes)
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not is_square(text, length, 768)  # 768: 729, padded
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("kernel", ["plain", "xla"])
def test_without_splash(tpu, kernel):
    """What the test above would see: all logits are made at once by "plain" alone."""
    text = compile_gradients(tpu, kernel, *SIZES["head_dim_64"])
    assert "tpu_custom_call" not in text and is_square(text, 1536) == (kernel == "plain")


def small_config(length: int, **changes) -> config_lib.Config:
    """A model that splash takes, in bfloat16; `changes` are of `config.model`."""
    base = tiny_config(mesh=MESH, data=config_lib.DataConfig(seq_len=length, max_tiles=2))
    llm = dataclasses.replace(base.model.llm, head_dim=64)
    return dataclasses.replace(
        base, model=dataclasses.replace(base.model, llm=llm, dtype="bfloat16", **changes)
    )


@pytest.mark.parametrize("remat", ["none", "full", "attention", "dots"])
def test_whole_model_compiles(tpu, remat):
    """Both towers take the kernel under nn.scan and nn.remat, from their own "auto"."""
    config = small_config(256, remat=remat)
    model = config.model
    params = state.abstract_params(vlm.VLM(model), tpu)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(tpu))
        for name, x in vlm.abstract_batch(
            config.model, config.data, config.train.batch_size
        ).items()
    }

    def loss(params, batch):
        return vlm.VLM(model).apply({"params": params}, batch).logits.sum()

    text = jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()
    # A tower's layers are one loop forward and one backward, which computes the forward kernel
    # again under remat.
    assert text.count('custom_call_target="tpu_custom_call"') == 2 * (
        3 if remat in ("none", "attention") else 4
    )


def compile_generation(mesh, length: int, num_new: int, kernel: str):
    config = small_config(length, attention=kernel)
    model = vlm.VLM(config.model)
    params = state.abstract_params(model, mesh)
    prompts = sampler.abstract_prompts(config, 4, mesh)
    ours = sampler.Sampler(model, mesh, end_ids=(1,), pad_id=0)
    return ours.lower({"params": params}, prompts, num_new).compile()


def test_generation_has_no_logits_of_a_prompt(tpu):
    """Both towers take the kernel in prefill, which has no backward pass; "plain" would make all
    logits."""
    length = 1536
    num_new = 5
    ours, dense = (compile_generation(tpu, length, num_new, kernel) for kernel in ("auto", "plain"))
    assert ours.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert not is_square(ours.as_text(), length, length + num_new)
    assert is_square(dense.as_text(), length, length + num_new)
    peaks = [program.memory_analysis().peak_memory_in_bytes for program in (ours, dense)]
    # bytes on a device: half of the rows and half of the heads
    logits = 4 * (4 // 2) * (4 // 2) * length**2
    assert peaks[1] - peaks[0] > logits / 2
