"""What a config leaves open of its mesh, for the paper's models on real slices, and that the
dimensions it goes by are those that the sharding rules shard."""

import dataclasses
import math

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.models.connectors import REGISTRY
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import state
from tests.conftest import tiny_config, tiny_connector


def asked(
    data: int, fsdp: int, tensor: int, widths: tuple[int, int] = (4096, 1152), **train
) -> config_lib.Config:
    """A config of batches of 256 sequences, with the widths of the paper's largest model."""
    base = tiny_config()
    llm = dataclasses.replace(base.model.llm, width=widths[0], num_heads=32, num_kv_heads=8)
    vision = dataclasses.replace(base.model.vision, width=widths[1], num_heads=16)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, llm=llm, vision=vision),
        mesh=config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        train=dataclasses.replace(base.train, **({"batch_size": 256} | train)),
    )


def resolve_sizes(
    config: config_lib.Config, num_devices: int, num_slices: int = 1
) -> mesh_lib.Sizes:
    """The sizes that a whole config asks for."""
    return mesh_lib.resolve_sizes(config.mesh, config.model, config.train, num_devices, num_slices)


@pytest.mark.parametrize(
    ("mesh", "num_devices", "num_slices", "found"),
    [
        ((-1, -1, 1), 16, 1, (1, 16, 1)),
        ((-1, -1, 1), 256, 1, (2, 128, 1)),
        ((-1, -1, -1), 256, 1, (2, 128, 1)),
        ((-1, -1, -1), 512, 1, (2, 128, 2)),  # 256 sequences: tensor takes what they cannot.
        ((-1, -1, -1), 1024, 1, (2, 128, 4)),
        ((-1, -1, 1), 32, 2, (2, 16, 1)),
        ((-1, -1, -1), 512, 2, (2, 128, 2)),
        ((-1, -1, 1), 256, 4, (4, 64, 1)),
        ((-1, 32, 1), 256, 1, (8, 32, 1)),
        ((4, -1, 1), 256, 1, (4, 64, 1)),
        ((-1, 1, 1), 8, 1, (8, 1, 1)),
    ],
)
def test_open_axes(mesh, num_devices, num_slices, found):
    assert resolve_sizes(asked(*mesh), num_devices, num_slices) == found


def test_the_size_of_a_microbatch_counts():
    """64 sequences at a time on 128 devices."""
    assert resolve_sizes(asked(-1, -1, -1, grad_accum_steps=4), 128) == (1, 64, 2)


@pytest.mark.parametrize(
    ("mesh", "num_devices", "num_slices", "message"),
    [
        ((1, -1, 1), 256, 1, r"fsdp would be 256, of which config.model.vision.width 1152 is no multiple; "
         r"with --config.mesh.data=2 the mesh is data 2 x fsdp 128 x tensor 1$"),
        ((-1, -1, 1), 512, 1, r"a microbatch of 256 .* data x fsdp = 512; nearest that does: "
         r"--config.train.batch_size=512; with --config.mesh.tensor=2 the mesh is data 2 x fsdp 128 x tensor 2$"),
        ((1, 32, 1), 32, 2, r"data 1 does not divide over 2 slices; .* --config.mesh.data=2 --config.mesh.fsdp=16 "),
        ((3, -1, 1), 256, 1, r"data 3 x fsdp -1 x tensor 1 does not fit 256 devices; with --config.mesh.data=2 "),
        ((1, 1, -1), 64, 1, r"tensor would be 64, of which config.model.llm.num_heads 32 and "),
        ((-1, -1, 1), 7, 1, r"microbatch of 256 .* data x fsdp = 7; nearest that does: --config.train.batch_size=259$"),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_what_does(mesh, num_devices, num_slices, message):
    with pytest.raises(UserError, match=message):
        resolve_sizes(asked(*mesh), num_devices, num_slices)


@pytest.mark.parametrize("name", REGISTRY)
def test_what_sizes_are_chosen_by_is_what_the_rules_shard(name):
    """With any connector: of every dimension that lies along an axis the common divisor must be
    one."""
    base = tiny_config(mesh=config_lib.MeshConfig(data=1, fsdp=1, tensor=1))
    llm = dataclasses.replace(
        base.model.llm, width=160, num_heads=32, num_kv_heads=8, vocab_size=96, mlp_width=224
    )
    vision = dataclasses.replace(base.model.vision, width=96, num_heads=32, mlp_width=352)
    connector = (
        config_lib.connector("ovis", visual_vocab_size=44)
        if name == "ovis"
        else tiny_connector(name)
    )
    model = dataclasses.replace(base.model, llm=llm, vision=vision, connector=connector)
    config = dataclasses.replace(base, model=model)
    params = state.abstract_params(
        vlm.VLM(model), mesh_lib.abstract(config.mesh, model, config.train, 1)
    )
    along = {"fsdp": mesh_lib._widths(model), "tensor": mesh_lib._heads(model)}
    common = {axis: math.gcd(*dimensions.values()) for axis, dimensions in along.items()}
    assert common == {"fsdp": 32, "tensor": 4 if name == "ovis" else 8}
    for path, x in state.flatten(params).items():
        for size, axis in zip(x.shape, x.sharding.spec, strict=False):
            assert axis is None or size % common[axis] == 0, (path, x.shape, x.sharding.spec)


def test_without_training_any_batch_will_do():
    """256 sequences do not divide over 512 devices, and without them tensor takes no part."""
    config = asked(-1, -1, -1)
    assert resolve_sizes(config, 512) == (2, 128, 2)
    assert mesh_lib.resolve_sizes(config.mesh, config.model, None, 512) == (4, 128, 1)


def test_largest_fsdp():
    config = asked(-1, -1, 1)
    assert [mesh_lib.largest_fsdp(config.model, count) for count in (1, 3, 100, 128, 512)] == [
        1,
        2,
        64,
        128,
        128,
    ]
