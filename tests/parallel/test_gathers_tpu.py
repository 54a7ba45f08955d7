"""How parameters cross the mesh, in programs of the TPU's own compiler, for chips that are not here;
needs libtpu, which only compiles."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax import presets
from alignvlm_jax.models.vit import Siglip
from alignvlm_jax.ops.vocab_average import Norm, vocab_average
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import collectives, hardware, hlo
from tests.conftest import tiny_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)

KEY = jax.eval_shape(lambda: jax.random.key(0))


@pytest.fixture
def tpu():
    """A mesh of 16 chips, all along fsdp, entered."""
    devices = hardware.compile_only_devices(hardware.parse_topology("v5e:4x4"))
    axes = config_lib.MeshConfig(data=1, fsdp=16, tensor=1)
    with mesh_lib.use(mesh_lib.make_mesh(axes, tiny_config().model, None, devices)) as mesh:
        yield mesh


def collectives_of(fn, out, *arguments) -> list[collectives.Collective]:
    text = jax.jit(fn, out_shardings=out).lower(*arguments).compile().as_text()
    return collectives.find(hlo.parse(text))


def test_the_encoder_gathers_kernels_and_does_not_window_its_matmuls(tpu):
    """SigLIP's width leaves 72 columns a chip: the partitioner's own choice is 16 narrow matmuls in
    a loop, their inputs passed round."""
    config = dataclasses.replace(presets.VISION["siglip_so400m_14_384"], num_layers=1)
    model = Siglip(config, jnp.bfloat16, "none", attention="splash")
    by_rows = sharding.batch_sharding(tpu)
    shape = (16, config.tile_height, config.tile_width, 3)
    tiles = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=by_rows)
    boxed = jax.eval_shape(lambda key, tiles: model.init(key, tiles), KEY, tiles)
    params = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec),
        sharding.unbox(boxed),
        sharding.tree_sharding(boxed, tpu),
    )
    found = collectives_of(lambda params, tiles: model.apply(params, tiles), by_rows, params, tiles)
    assert {one.kind for one in found if one.bytes > 2**20} == {"all-gather"}


def test_align_gathers_its_matrices_once(tpu):
    """And scatters the gradients chunk by chunk: no float32 matrix is whole on a chip."""
    rows, width, vocab = 16 * 512, 1024, 8192
    shardings = [
        sharding.NamedSharding(tpu, jax.sharding.PartitionSpec(*spec))
        for spec in (("fsdp",), ("fsdp",), (None, "fsdp"), ())
    ]
    shapes = (rows, width), (width, vocab), (vocab, width), (vocab,)
    dtypes = jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32
    x, head, table, scale = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=spec)
        for shape, dtype, spec in zip(shapes, dtypes, shardings, strict=True)
    )

    def total(x, head, table, scale):
        norm = Norm(scale, scale, 1e-5)
        averages = vocab_average(x, head, table, norm, chunk=1024).average
        return jnp.square(averages.astype(jnp.float32)).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2))
    found = collectives_of(gradients, tuple(shardings[:3]), x, head, table, scale)
    matrix = 2 * width * vocab  # bytes in bfloat16
    gathers = [one for one in found if one.kind == "all-gather" and one.bytes == matrix]
    # W2 and the table, in the forward pass and again in the backward pass at most.
    assert 2 <= sum(one.times for one in gathers) <= 4
    # A float32 matrix has twice the bytes; the compiler joins the two gradients of a chunk.
    assert all(one.bytes < matrix for one in found if one not in gathers)
