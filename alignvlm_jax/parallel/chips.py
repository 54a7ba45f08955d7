"""Accelerators: what they can do, and TPU topologies to compile for where none is at hand."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from alignvlm_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as it is rented: dense bfloat16 TFLOP/s as its maker states them, and the GiB of HBM that XLA may use.

    For TPUs also the GB/s that all its links send, and the slices on offer.
    """

    tflops: float
    hbm_gib: float
    link_gb: float = math.nan
    shapes: tuple[str, ...] = ()


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")

CHIPS = {
    "v5e": Chip(197, 15.75, 200, _FLAT),
    "v5p": Chip(459, 95.74, 600, _CUBES),
    "v6e": Chip(918, 31.25, 448, _FLAT),
    "a100": Chip(312, 80.0),
    "h100": Chip(989, 80.0),
    "h200": Chip(989, 141.0),
}

KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""Chips by jax's `device_kind`. Of all of them one device is one chip."""


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the chip that a device is; None where it is not known, and no peak should be claimed."""
    return CHIPS.get(KINDS.get(device.device_kind, ""))


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice by name, such as v5p:4x4x4."""

    name: str
    chip: Chip
    num_chips: int


def parse_topology(name: str) -> Topology:
    """Returns the slice that `name` means; UserError with the nearest where there is none."""
    known = {f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes}
    if name not in known:
        kind = name.split(":")[0]
        same_kind = [other for other in known if other.startswith(f"{kind}:")]
        hint = nearest(name, same_kind or known)
        if same_kind:
            hint = f"; {kind} slices: {', '.join(shape for shape in CHIPS[kind].shapes)}"
        raise UserError(f"unknown topology {name!r}{hint}")
    kind, shape = name.split(":")
    return Topology(name, CHIPS[kind], math.prod(map(int, shape.split("x"))))


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed (requirements-tpu.txt)."""
    return importlib.util.find_spec("libtpu") is not None


def compile_only_devices(topology: Topology) -> Sequence[jax.Device]:
    """Returns the devices of a slice that is not there: programs can be compiled for them and not be run.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    if not has_tpu_compiler():
        raise UserError("compiling for a TPU needs libtpu: pip install --requirement requirements-tpu.txt")
    # No question to a metadata server that is not there, and no quarrel over a lock with another such process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(topology.name, platform="tpu").devices
    except RuntimeError as err:
        raise UserError(f"libtpu does not know {topology.name}: {str(err).splitlines()[0]}") from err
