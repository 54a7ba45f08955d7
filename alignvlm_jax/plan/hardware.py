"""Accelerators: what they can do, and TPU topologies to compile for where none is at hand."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignvlm_jax.errors import UserError, closest, how_to_install, nearest

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as it is rented, in the numbers of one of its devices, of which jax and the compiler
    speak.

    Dense bfloat16 TFLOP/s as its maker states them, and the GiB of HBM that XLA may use. For TPUs
    also the GB/s of HBM, the GB/s that all its links send, the clock in GHz, and the slices on
    offer.
    """

    tflops: float
    hbm_gib: float
    hbm_gb: float = math.nan
    link_gb: float = math.nan
    ghz: float = math.nan
    shapes: tuple[str, ...] = ()
    num_devices: int = 1


# From small to large: `search.smallest` and `printing.larger` walk through them in this order.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
)

# GB/s of HBM and of links are Google's (cloud.google.com/tpu/docs/v5e, v5p, v6e). Of clocks v5p's,
# 1.75 GHz, is stated, and the others follow from the peaks: at 131,072 FLOPs a cycle v5e's is 1.5
# GHz, at 524,288 v6e's 1.75 and a TPU7x device's 2.2. A matmul of 4,096 rows, compiled for v5e, has
# 97 % of these FLOPs in each of its estimated cycles, for v5p 96, v6e 87, TPU7x 83.
CHIPS = {
    "v5e": Chip(197, 15.75, 819, 200, 1.5, _FLAT),
    "v5p": Chip(459, 95.74, 2765, 600, 1.75, _CUBES),
    "v6e": Chip(918, 31.25, 1640, 448, 1.75, _FLAT),
    # Each of its two chiplets is a device of jax. Per chip 2,307 TFLOP/s, 192 GiB, and 1,200 GB/s
    # in both directions of its links (cloud.google.com/tpu/docs/tpu7x), so 600 one way; the faster
    # link between the two is not counted.
    "tpu7x": Chip(2307 / 2, 94.75, 7380 / 2, 600 / 2, 2.2, _CUBES, num_devices=2),
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
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""Chips by jax's `device_kind`."""

NETWORK_GB = 6.25
"""GB/s that a device sends over the data-centre network: 50 Gbit/s a chip of v5p
(cloud.google.com/tpu/docs)."""

# Of slices of several hosts, of every kind; a single host of v5e or v6e may have 8.
CHIPS_A_HOST = 4


def chip_of(device: "jax.Device") -> Chip | None:
    """Returns the chip that a device is, or is a part of; None where it is not known, and no peak
    should be claimed."""
    return CHIPS.get(KINDS.get(device.device_kind, ""))


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several TPU slices of a shape, such as v5p:4x4x4; all counts are of all slices
    together."""

    shape: str
    chip: Chip
    num_chips: int
    num_slices: int = 1

    @property
    def name(self) -> str:
        return self.shape if self.num_slices == 1 else f"{self.num_slices} x {self.shape}"

    @property
    def kind(self) -> str:
        return self.shape.split(":")[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Chips along each axis of a slice."""
        return tuple(map(int, self.shape.split(":")[1].split("x")))

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links of each axis close into a ring: of v5e and v6e axes of 16 chips do, of
        cubes all where each is a multiple of 4 (cloud.google.com/tpu/docs/v5e, v4)."""
        if len(self.sizes) == 2:
            return tuple(size == 16 for size in self.sizes)
        return (all(size % 4 == 0 for size in self.sizes),) * len(self.sizes)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.num_devices

    @property
    def devices_a_slice(self) -> int:
        """Devices of one slice, over which parameters are sharded at most: slices hold copies."""
        return self.num_devices // self.num_slices

    @property
    def num_hosts(self) -> int:
        return self.num_chips // CHIPS_A_HOST

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s of all chips."""
        return self.num_devices * self.chip.tflops * 1e12


def check_kind(kind: str) -> None:
    """Raises UserError with the nearest where there are no slices of such chips."""
    kinds = [name for name, chip in CHIPS.items() if chip.shapes]
    if kind in kinds:
        return
    if kind in CHIPS:
        raise UserError(f"{kind} is a GPU; there are plans for slices of {', '.join(kinds)}")
    raise UserError(f"unknown kind of TPU {kind!r}{nearest(kind, kinds)}")


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """Returns as many slices as `name` means; UserError with the nearest where there is none."""
    kind, _, shape = name.partition(":")
    if kind in CHIPS:
        check_kind(kind)
    if kind not in CHIPS or shape not in CHIPS[kind].shapes:
        known = {f"{kind}:{shape}" for kind, chip in CHIPS.items() for shape in chip.shapes}
        hint = nearest(name, known)
        if kind in CHIPS:
            near = closest(shape, CHIPS[kind].shapes)
            hint = f"; {kind} slices: {', '.join(CHIPS[kind].shapes)}"
            hint += f"; did you mean '{kind}:{near}'?" if near else ""
        raise UserError(f"unknown topology {name!r}{hint}")
    return Topology(
        name, CHIPS[kind], num_slices * math.prod(map(int, shape.split("x"))), num_slices
    )


def at_least(topology: Topology) -> list[Topology]:
    """Returns a topology and the larger ones of its kind, as many slices each, from small to
    large."""
    found = [
        parse_topology(f"{topology.kind}:{shape}", topology.num_slices)
        for shape in topology.chip.shapes
    ]
    return [topology, *(one for one in found if one.num_chips > topology.num_chips)]


def has_tpu_compiler() -> bool:
    """Whether libtpu is installed (requirements-tpu.txt)."""
    return importlib.util.find_spec("libtpu") is not None


def compile_only_devices(topology: Topology) -> "Sequence[jax.Device]":
    """Returns the devices of slices that are not there: programs can be compiled for them and not
    be run.

    Raises:
      UserError: libtpu is not installed, or does not know the slice.
    """
    if not has_tpu_compiler():
        raise UserError(
            f"compiling for a TPU needs libtpu: {how_to_install('tpu', 'tpu-compiler')}"
        )
    # Late: whoever misspelt a topology should not wait for jax.
    from jax.experimental import topologies

    # No question to a metadata server that is not there, and no quarrel over a lock with another
    # such process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        # libtpu takes it for slices of a multi-slice job, with a slice_index, where a number is
        # named.
        slices = {} if topology.num_slices == 1 else {"num_slices": topology.num_slices}
        return topologies.get_topology_desc(topology.shape, platform="tpu", **slices).devices
    except RuntimeError as err:
        raise UserError(
            f"libtpu does not know {topology.name}: {str(err).splitlines()[0]}"
        ) from err
