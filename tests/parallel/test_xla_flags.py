"""Compiler flags by kind of TPU: which, how a machine knows its own, what a user's environment
keeps; and that the compiler accepts every one of them."""

import os
import subprocess
import sys

import pytest

from alignvlm_jax.parallel import xla_flags
from alignvlm_jax.parallel.xla_flags import PRESETS, VARIABLE
from alignvlm_jax.plan import hardware

ASYNC = "xla_enable_async_all_gather"


@pytest.fixture(autouse=True)
def _no_bus(monkeypatch, tmp_path):
    monkeypatch.setattr(xla_flags, "_PCI_DEVICES", tmp_path)


def on_bus(folder, vendor: str, device: str) -> None:
    place = folder / "0000:00:04.0"
    place.mkdir()
    (place / "vendor").write_text(f"{vendor}\n")
    (place / "device").write_text(f"{device}\n")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v5litepod-16", "v5e"),
        ("v5p-128", "v5p"),
        ("v6e-256", "v6e"),
        ("tpu7x-8", "tpu7x"),
        ("v9-8", "v9-8"),
    ],
)
def test_kind_by_environment(name, kind):
    assert xla_flags.tpu_kind({"TPU_ACCELERATOR_TYPE": name}) == kind


@pytest.mark.parametrize(
    ("vendor", "device", "kind"),
    [
        ("0x1ae0", "0x0062", "v5p"),
        ("0x1ae0", "0x006f", "v6e"),
        ("0x1ae0", "0x0042", None),
        ("0x10de", "0x0062", None),
    ],
)
def test_kind_by_bus(tmp_path, vendor, device, kind):
    """The second is Google's network card, or another maker's device."""
    on_bus(tmp_path, vendor, device)
    assert xla_flags.tpu_kind({}) == kind


def test_bus_ids_are_those_that_jax_knows():
    from jax._src import hardware_utils

    known = {number: version.name for number, version in hardware_utils._TPU_PCI_DEVICE_IDS.items()}
    assert xla_flags._PCI_IDS.items() <= known.items()


def test_every_tpu_has_a_preset():
    assert PRESETS.keys() == {kind for kind, chip in hardware.CHIPS.items() if chip.shapes}


def test_no_tpu_no_word():
    environment = {}
    assert xla_flags.apply_preset(environment) == "" and environment == {}


def test_unknown_tpu_is_told():
    environment = {"TPU_ACCELERATOR_TYPE": "v9-8"}
    assert (
        xla_flags.apply_preset(environment)
        == "XLA flags: no preset for TPU v9-8; known: v5e, v5p, v6e, tpu7x"
    )
    assert VARIABLE not in environment


def test_preset_is_set_and_told():
    environment = {"TPU_ACCELERATOR_TYPE": "v6e-16"}
    line = xla_flags.apply_preset(environment)
    assert environment[VARIABLE].split() == [
        f"--{name}={value}" for name, value in PRESETS["v6e"].items()
    ]
    assert environment[VARIABLE] in line and "ALIGNVLM_XLA_PRESET=0" in line and "\n" not in line


@pytest.mark.parametrize(("slices", "more"), [("1", False), ("2", True), ("", False)])
def test_slices_have_flags_of_their_own(slices, more):
    environment = {"TPU_ACCELERATOR_TYPE": "v5p-128", "MEGASCALE_NUM_SLICES": slices}
    xla_flags.apply_preset(environment)
    assert ("xla_tpu_enable_data_parallel_all_reduce_opt" in environment[VARIABLE]) is more


@pytest.mark.parametrize(
    ("variable", "theirs"),
    [
        (VARIABLE, f"--{ASYNC}=false --other=3"),
        (VARIABLE, f"--no{ASYNC}"),
        ("XLA_FLAGS", f"--{ASYNC}=false"),
    ],
)
def test_the_environment_wins_flag_by_flag(variable, theirs):
    environment = {"TPU_ACCELERATOR_TYPE": "v5p-128", variable: theirs}
    line = xla_flags.apply_preset(environment)
    assert environment[variable].startswith(theirs)
    assert f"--{ASYNC}=true" not in environment[VARIABLE]
    assert "--xla_tpu_overlap_compute_collective_tc=true" in environment[VARIABLE]
    assert line.endswith(f"of the environment stay {ASYNC}")


def test_switched_off():
    environment = {"TPU_ACCELERATOR_TYPE": "v5p-128", "ALIGNVLM_XLA_PRESET": "0", VARIABLE: "--a=b"}
    assert "is off" in xla_flags.apply_preset(environment)
    assert environment[VARIABLE] == "--a=b"


COMPILE = """
import sys
from alignvlm_jax.plan import hardware
from alignvlm_jax.parallel import xla_flags
print(xla_flags.set_flags(sys.argv[1], several_slices=True))
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
shape = hardware.CHIPS[sys.argv[1]].shapes[0]
device = hardware.compile_only_devices(hardware.parse_topology(f"{sys.argv[1]}:{shape}"))[0]
x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x @ x).lower(x).compile()
print("compiled")
"""


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
@pytest.mark.parametrize(
    ("kind", "more", "accepted"),
    [*((kind, "", True) for kind in PRESETS), ("v5e", "--xla_tpu_no_such=1", False)],
)
def test_the_compiler_accepts_every_flag(kind, more, accepted):
    """It ends a process that names one which it does not know: the last case shows that it
    looks."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", VARIABLE: more}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, kind], capture_output=True, text=True, env=environment
    )
    assert ("compiled" in done.stdout) is accepted, done.stderr
    assert accepted or "xla_tpu_no_such" in done.stderr
