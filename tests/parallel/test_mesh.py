"""The mesh that a config asks for, and what is said where it cannot be had."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import chips
from alignvlm_jax.parallel import mesh as mesh_lib


def with_mesh(config: config_lib.Config, data: int, fsdp: int, tensor: int, **train) -> config_lib.Config:
    return dataclasses.replace(
        config,
        mesh=config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
        train=dataclasses.replace(config.train, **train),
    )


@pytest.mark.parametrize(
    ("asked", "shape"),
    [((2, 2, 2), (2, 2, 2)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 2), (1, 4, 2)), ((1, 1, -1), (1, 1, 8))],
)
def test_sizes(config, asked, shape):
    mesh = mesh_lib.make_mesh(with_mesh(config, *asked))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert list(mesh.devices.flat) == jax.devices()


def test_given_devices(config):
    mesh = mesh_lib.make_mesh(with_mesh(config, 1, 2, 1), jax.devices()[3:5])
    assert list(mesh.devices.flat) == jax.devices()[3:5]


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A chip of a machine that is not here."""

    platform: str
    id: int
    slice_index: int
    coords: tuple[int, int, int]
    device_kind: str = "a chip"
    core_on_chip: int = 0


def chips_of(platform: str, count: int, width: int, height: int) -> list[FakeDevice]:
    """Slices, or nodes, of width x height chips each."""
    places = itertools.product(range(count), range(height), range(width))
    return [FakeDevice(platform, i, piece, (x, y, 0)) for i, (piece, y, x) in enumerate(places)]


def grid(config: config_lib.Config, asked: tuple[int, int, int], devices: list[FakeDevice]) -> np.ndarray:
    """The devices as they lie in the mesh, which must be all of them."""
    found = mesh_lib.make_mesh(with_mesh(config, *asked, batch_size=64), devices).devices
    assert found.shape == asked and set(found.flat) == set(devices)
    return found


@pytest.mark.parametrize("asked", [(1, 8, 2), (2, 2, 4), (1, 2, 8)])
def test_two_axes_may_lie_along_one_link(config, asked):
    """Of 4 x 4 chips."""
    grid(config, asked, chips_of("tpu", 1, 4, 4))


@pytest.mark.skipif(not chips.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)")
@pytest.mark.parametrize("name", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_devices_that_are_compiled_for(config, name):
    devices = chips.compile_only_devices(chips.parse_topology(name))
    mesh = mesh_lib.make_mesh(with_mesh(config, 1, 8, 2, batch_size=64), devices)
    assert set(mesh.devices.flat) == set(devices)


def test_only_data_crosses_slices(config):
    found = grid(config, (4, 2, 2), chips_of("tpu", 2, 4, 2))
    assert [{device.slice_index for device in part.flat} for part in found] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data 1 does not divide over 2 slices.*nearest that does: 2"):
        grid(config, (1, 8, 2), chips_of("tpu", 2, 4, 2))


def test_fsdp_crosses_the_nodes_of_gpus(config):
    """jax takes each of them for a slice."""
    found = grid(config, (1, 8, 2), chips_of("gpu", 2, 8, 1))
    assert [device.id for device in found.flat] == list(range(16))


@pytest.mark.parametrize("asked", [(3, 1, 2), (2, 2, 4), (-1, 3, 1), (-1, 16, 1)])
def test_devices_do_not_fit(config, asked):
    data, fsdp, tensor = asked
    with pytest.raises(UserError, match=f"data {data} x fsdp {fsdp} x tensor {tensor} does not fit 8 devices"):
        mesh_lib.make_mesh(with_mesh(config, *asked))


def test_every_process_needs_rows_of_its_own(config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match="data x fsdp = 4 does not divide over 3 processes"):
        mesh_lib.make_mesh(config)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    mesh_lib.make_mesh(config)


@pytest.mark.parametrize("asked", [(-1, -1, 2), (0, 2, 2), (-2, 2, 2)])
def test_impossible_sizes(config, asked):
    data, fsdp, tensor = asked
    with pytest.raises(UserError, match=f"data {data} x fsdp {fsdp} x tensor {tensor}: each axis is at least 1"):
        mesh_lib.make_mesh(with_mesh(config, *asked))


@pytest.mark.parametrize(
    ("rows", "accumulation", "message"),
    [
        (6, 1, r"batch of 6 rows .*batch_size 6 / accumulation 1\).*data x fsdp = 4; nearest that does: (4|8)$"),
        (9, 1, r"batch of 9 rows .*data x fsdp = 4; nearest that does: 8$"),
        (12, 2, r"batch of 6 rows .*batch_size 12 / accumulation 2\).*data x fsdp = 4; nearest that does: (8|16)$"),
        (1, 1, r"batch of 1 rows .*nearest that does: 4$"),
    ],
)
def test_batch_does_not_divide(config, rows, accumulation, message):
    with pytest.raises(UserError, match=message):
        mesh_lib.make_mesh(with_mesh(config, 2, 2, 2, batch_size=rows, accumulation=accumulation))


def test_constraints_live_only_inside(config):
    """`with mesh:` alone would lose every one of them without a word."""

    def lowered() -> str:
        return (
            jax.jit(lambda x: nn.with_logical_constraint(x, ("act_batch", "act_vocab")))
            .lower(jnp.ones((8, 8)))
            .as_text()
        )

    with mesh_lib.use(mesh_lib.make_mesh(config)):
        inside = lowered()
    assert '[{"data", "fsdp"}, {"tensor"}]' in inside
    assert "sharding_constraint" not in lowered()
