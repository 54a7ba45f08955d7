"""The mesh that a config asks for, and what is said where it cannot be had."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, Mesh

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import hardware
from tests.parallel.fake_slices import FakeDevice, fake_slice


def with_mesh(
    config: config_lib.Config, data: int, fsdp: int, tensor: int, **train
) -> config_lib.Config:
    return dataclasses.replace(
        config,
        mesh=config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        train=dataclasses.replace(config.train, **train),
    )


def make_mesh(config: config_lib.Config, devices: Sequence | None = None) -> Mesh:
    """The mesh that a whole config asks for."""
    return mesh_lib.make_mesh(config.mesh, config.model, config.train, devices)


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, -1, 2), (1, 4, 2)),
        ((1, 4, -1), (1, 4, 2)),
        ((-1, -1, 2), (1, 4, 2)),
        ((-1, -1, -1), (1, 8, 1)),
    ],
)
def test_sizes(config, asked, shape):
    mesh = make_mesh(with_mesh(config, *asked))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert list(mesh.devices.flat) == jax.devices()


def test_given_devices(config):
    mesh = make_mesh(with_mesh(config, 1, 2, 1), jax.devices()[3:5])
    assert list(mesh.devices.flat) == jax.devices()[3:5]


def with_widths(config: config_lib.Config, llm: int, vision: int) -> config_lib.Config:
    model = config.model
    parts = {
        "llm": dataclasses.replace(model.llm, width=llm),
        "vision": dataclasses.replace(model.vision, width=vision),
    }
    return dataclasses.replace(config, model=dataclasses.replace(model, **parts))


def grid(
    config: config_lib.Config, asked: tuple[int, int, int], devices: list[FakeDevice]
) -> np.ndarray:
    """The devices as they lie in the mesh, which must be all of them."""
    found = make_mesh(with_mesh(config, *asked, batch_size=64), devices).devices
    assert found.shape == asked and set(found.flat) == set(devices)
    return found


@pytest.mark.parametrize("asked", [(1, 8, 2), (2, 2, 4), (1, 2, 8)])
def test_two_axes_may_lie_along_one_link(config, asked):
    """Of 4 x 4 chips."""
    grid(config, asked, fake_slice("v5e", (4, 4, 1)))


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_devices_that_are_compiled_for(config, name):
    devices = hardware.compile_only_devices(hardware.parse_topology(name))
    mesh = make_mesh(with_mesh(config, 1, 8, 2, batch_size=64), devices)
    assert set(mesh.devices.flat) == set(devices)


def test_only_data_crosses_slices(config):
    devices = fake_slice("v5e", (4, 2, 1), num_slices=2)
    found = grid(config, (4, 2, 2), devices)
    assert [{device.slice_index for device in part.flat} for part in found] == [{0}, {0}, {1}, {1}]
    with pytest.raises(
        UserError, match=r"data 1 does not divide over 2 slices.*--config.mesh.data=2 .*fsdp=4"
    ):
        grid(config, (1, 8, 2), devices)


def test_fsdp_crosses_the_nodes_of_gpus(config):
    """jax takes each of them for a slice."""
    nodes = fake_slice("v5e", (8, 1, 1), num_slices=2, host=(8, 1, 1))
    found = grid(
        config, (1, 8, 2), [dataclasses.replace(device, platform="gpu") for device in nodes]
    )
    assert [device.id for device in found.flat] == list(range(16))


SLICES = [
    *(("v5e", shape, 1) for shape in [(4, 4, 1), (4, 8, 1), (8, 8, 1), (8, 16, 1), (16, 16, 1)]),
    *(("v5p", shape, 1) for shape in [(2, 2, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)]),
    *(("v6e", shape, 1) for shape in [(4, 4, 1), (16, 16, 1)]),
    *(("tpu7x", shape, 1) for shape in [(2, 2, 1), (2, 2, 4), (4, 4, 8)]),
    ("v5e", (4, 4, 1), 2),
    ("v5e", (16, 16, 1), 2),
]


@pytest.mark.parametrize(("kind", "shape", "num_slices"), SLICES)
def test_widest_on_any_slice(config, monkeypatch, kind, shape, num_slices):
    """All of its devices, since a part of a slice forms no mesh; width 128 takes an fsdp of at most
    128."""
    devices = fake_slice(kind, shape, num_slices)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))
    wide = with_widths(config, llm=384, vision=1152)
    fsdp = min(128, len(devices) // num_slices)
    trained_elsewhere = with_mesh(wide, 3, 1, 1)
    trained_open = with_mesh(wide, -1, -1, -1)
    for mesh in (
        mesh_lib.widest(wide.model),
        mesh_lib.for_inference(trained_elsewhere.mesh, trained_elsewhere.model),
        mesh_lib.for_inference(trained_open.mesh, trained_open.model),
    ):
        assert set(mesh.devices.flat) == set(devices)
        assert dict(mesh.shape) == {"data": len(devices) // fsdp, "fsdp": fsdp, "tensor": 1}
        for part in mesh.devices.reshape(num_slices, -1):
            assert len({device.slice_index for device in part}) == 1


@pytest.mark.parametrize(("kind", "shape", "num_slices"), SLICES)
def test_open_axes_lie_on_any_slice(config, kind, shape, num_slices):
    """A batch of 256 sequences: on 512 chips tensor takes part."""
    devices = fake_slice(kind, shape, num_slices)
    heads = dataclasses.replace(config.model.llm, num_heads=8, num_kv_heads=8)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=heads))
    mesh = make_mesh(with_mesh(with_widths(wide, 4096, 1152), -1, -1, -1, batch_size=256), devices)
    assert set(mesh.devices.flat) == set(devices)
    assert mesh.shape["tensor"] == max(len(devices) // 256, 1)


@pytest.mark.parametrize(("count", "fsdp"), [(1, 1), (3, 2), (6, 4), (8, 8)])
def test_widest_leaves_out_devices_that_would_hold_copies(config, monkeypatch, count, fsdp):
    """Off TPUs, where any few of them form a mesh; with several processes each needs its own."""
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert dict(mesh_lib.widest(config.model).shape) == {"data": 1, "fsdp": fsdp, "tensor": 1}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert mesh_lib.widest(config.model).devices.size == count


def test_tensor_may_cross_hosts(config, monkeypatch):
    """Rows follow the sharding: hosts that share some feed the same ones."""
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    devices = fake_slice("v5p", (4, 4, 4))
    mesh = make_mesh(with_mesh(config, 1, 8, 8, batch_size=64), devices)
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)[0]
    assert any(len(set(row)) > 1 for row in hosts.tolist())


@pytest.mark.parametrize("asked", [(3, 1, 2), (2, 2, 4), (-1, 3, 1), (-1, 16, 1)])
def test_devices_do_not_fit(config, asked):
    data, fsdp, tensor = asked
    with pytest.raises(
        UserError, match=f"data {data} x fsdp {fsdp} x tensor {tensor} does not fit 8 devices"
    ):
        make_mesh(with_mesh(config, *asked))


@pytest.mark.parametrize("asked", [(-3, -1, 2), (0, 2, 2), (-2, 2, 2)])
def test_impossible_sizes(config, asked):
    data, fsdp, tensor = asked
    with pytest.raises(
        UserError, match=f"data {data} x fsdp {fsdp} x tensor {tensor}: each axis is at least 1"
    ):
        make_mesh(with_mesh(config, *asked))


@pytest.mark.parametrize(
    ("rows", "grad_accum_steps", "message"),
    [
        (
            6,
            1,
            r"a microbatch of 6 .*batch_size 6 / grad_accum_steps 1\).*data x fsdp = 4; .*batch_size=(4|8)$",
        ),
        (
            9,
            1,
            r"a microbatch of 9 .*data x fsdp = 4; nearest that does: --config.train.batch_size=8$",
        ),
        (
            12,
            2,
            r"a microbatch of 6 .*batch_size 12 / grad_accum_steps 2\).*--config.train.grad_accum_steps=1 or ",
        ),
        (1, 1, r"a microbatch of 1 .*nearest that does: --config.train.batch_size=4$"),
    ],
)
def test_batch_does_not_divide(config, rows, grad_accum_steps, message):
    with pytest.raises(UserError, match=message):
        make_mesh(with_mesh(config, 2, 2, 2, batch_size=rows, grad_accum_steps=grad_accum_steps))


def test_constraints_live_only_inside(config):
    """`with mesh:` alone would lose every one of them without a word."""

    def lowered() -> str:
        return (
            jax.jit(lambda x: nn.with_logical_constraint(x, ("act_batch", "act_vocab")))
            .lower(jnp.ones((8, 8)))
            .as_text()
        )

    with mesh_lib.use(make_mesh(config)):
        inside = lowered()
    assert '[{"data", "fsdp"}, {"tensor"}]' in inside
    assert "sharding_constraint" not in lowered()
