"""The mesh that a config asks for, and what is said where it cannot be had."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
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
