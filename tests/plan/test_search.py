"""The search for a layout, by a compiler that is told how much memory a row takes."""

import dataclasses
from collections.abc import Callable

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.plan import aot, hardware, search
from alignvlm_jax.plan.aot import Plan
from alignvlm_jax.plan.hardware import Topology
from alignvlm_jax.plan.search import Search
from tests.conftest import tiny_config

CONFIG = tiny_config(train=config_lib.TrainConfig(batch_size=32))
PAPER = tiny_config(
    model=dataclasses.replace(
        tiny_config().model,
        llm=dataclasses.replace(tiny_config().model.llm, width=4096, num_heads=8, num_kv_heads=8),
        vision=dataclasses.replace(tiny_config().model.vision, width=1152, num_heads=16),
    ),
    train=config_lib.TrainConfig(batch_size=256),
)
V5E = hardware.parse_topology("v5e:2x2")
HELD = 1.0  # GiB


@pytest.fixture
def compiler(monkeypatch):
    """Sets the GiB of a row by remat policy; returns the plans that were made."""
    made: list[Plan] = []

    def set_up(a_row: Callable[[str], float]) -> list[Plan]:
        def make(config: config_lib.Config, topology: Topology, devices: object) -> Plan:
            mesh = dataclasses.asdict(config.mesh)
            rows = (
                config.train.batch_size
                // config.train.grad_accum_steps
                // (mesh["data"] * mesh["fsdp"])
            )
            peak = HELD + rows * a_row(config.model.remat)
            made.append(
                Plan(
                    topology=topology, config=config, mesh=mesh, num_params=1, num_trained=1, param_gib=0.0,
                    optimizer_gib=0.0, state_gib=0.0, peak_hbm_gib=peak, fits=peak <= topology.chip.hbm_gib,
                    is_estimate=False, flops={"vision": 1e15, "llm": 1e16}, communication={},
                )
            )  # fmt: skip
            return made[-1]

        monkeypatch.setattr(aot, "make", make)
        monkeypatch.setattr(aot, "state_gib", lambda config, topology: HELD)
        return made

    return set_up


def best() -> Plan:
    return Search(CONFIG, V5E).best((), lambda line: None)


def test_all_rows_at_once_where_they_fit(compiler):
    made = compiler(lambda remat: 0.1)
    plan = best()
    assert {other.mesh["tensor"] for other in made} == {1, 2}  # 4 does not divide 2 key-value heads
    assert (plan.config.model.remat, plan.config.train.grad_accum_steps) == ("none", 1)


def test_less_is_computed_twice_with_fewer_rows_at_a_time(compiler):
    """8 rows a chip: "full" takes 4 at a time, "dots" 2, "none" not one."""
    made = compiler({"full": 3.0, "dots": 6.0, "none": 20.0}.__getitem__)
    plan = best()
    assert (
        plan.config.model.remat,
        plan.config.train.grad_accum_steps * plan.config.mesh.fsdp,
    ) == (
        "dots",
        16,
    )
    assert any(
        other.fits and other.config.train.grad_accum_steps * other.config.mesh.fsdp == 8
        for other in made
    )


def test_where_nothing_fits_the_nearest_miss_is_shown(compiler):
    compiler(lambda remat: 30.0)
    plan = best()
    assert not plan.fits and plan.config.model.remat == "full"


def test_smallest_slice(compiler):
    compiler(lambda remat: 10.0)
    assert search.smallest(CONFIG, "v5e", lambda topology: (), lambda line: None).topology == V5E


def test_no_slice_is_large_enough(compiler):
    """Nor can 32 rows be laid over 256 chips: the largest that was tried is shown."""
    compiler(lambda remat: 30.0)
    plan = search.smallest(CONFIG, "v5e", lambda topology: (), lambda line: None)
    assert not plan.fits and plan.topology.name == "v5e:8x8"


def test_no_slice_holds_the_parameters(compiler, monkeypatch):
    compiler(lambda remat: 1.0)
    monkeypatch.setattr(aot, "state_gib", lambda config, topology: 100.0)
    with pytest.raises(UserError, match="no mesh of 128 chips takes a batch of 32 rows"):
        search.smallest(CONFIG, "v5e", lambda topology: (), lambda line: None)


def test_meshes_tried_are_the_most_sharded_and_a_narrow_one(compiler):
    """A batch of 256 rows on 512 chips: no mesh without tensor; widths of 4,096 and 1,152 take
    128."""
    found = [
        dataclasses.astuple(mesh)
        for mesh in Search(PAPER, hardware.parse_topology("v5p:8x8x8")).meshes()
    ]
    assert found == [(2, 128, 2), (16, 16, 2), (1, 128, 4), (8, 16, 4), (1, 64, 8), (4, 16, 8)]


def test_data_lies_across_slices(compiler):
    made = compiler(lambda remat: 0.1)
    Search(PAPER, hardware.parse_topology("v5e:4x4", num_slices=2)).best((), lambda line: None)
    assert {plan.mesh["data"] % 2 for plan in made} == {0} and len(
        {plan.mesh["fsdp"] for plan in made}
    ) > 1
