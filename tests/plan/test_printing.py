"""A plan as people read it."""

import dataclasses

from alignvlm_jax import config as config_lib
from alignvlm_jax.plan import hardware, printing
from alignvlm_jax.plan.aot import Plan
from alignvlm_jax.plan.timing import Timing
from tests.conftest import tiny_config

PLAN = Plan(
    topology=hardware.parse_topology("v5e:2x2"),
    config=tiny_config(train=config_lib.TrainConfig(num_steps=1000, batch_size=8)),
    mesh={"data": 1, "fsdp": 4, "tensor": 1},
    num_params=1,
    num_trained=1,
    param_gib=1.0,
    optimizer_gib=2.0,
    state_gib=3.0,
    peak_hbm_gib=4.0,
    fits=True,
    is_estimate=False,
    flops={"vision": 1.349e10, "llm": 3.805e10},
    communication={},
    timing=Timing({"llm": 0.01}, 0.0, 0.0, 0.0, 0.0, 0.0),
)


def test_a_tiny_model_is_not_shown_as_nothing():
    lines = printing.text(PLAN).splitlines()
    assert ["vision", "0.0135", "26%"] in [line.split() for line in lines]
    assert ["all", "0.0515"] in [line.split() for line in lines]
    # 1000 steps of 10 ms on 4 chips
    assert any("0.0111 chip-hours" in line for line in lines)


def test_a_large_one_is_shown_to_the_tflop():
    flops = {name: 1e7 * value for name, value in PLAN.flops.items()}
    lines = printing.text(dataclasses.replace(PLAN, flops=flops)).splitlines()
    assert ["vision", "134,900", "26%"] in [line.split() for line in lines]
