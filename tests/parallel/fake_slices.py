"""Devices of TPU slices that are not there, in jax's order: host after host."""

import dataclasses
import itertools

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What `mesh_utils` looks at of a device."""

    id: int
    coords: Shape
    process_index: int
    device_kind: str
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"


def fake_slice(
    kind: str, shape: Shape, num_slices: int = 1, host: Shape = (2, 2, 1)
) -> list[FakeDevice]:
    """Returns the devices of slices of `shape` chips, of which a host has `host`; a TPU7x chip is
    two devices."""
    devices: list[FakeDevice] = []
    hosts = [size // step for size, step in zip(shape, host, strict=True)]
    corners = itertools.product(range(num_slices), *map(range, reversed(hosts)))
    for process, (piece, *corner) in enumerate(corners):
        for *offset, core in itertools.product(
            *map(range, reversed(host)), range(2 if kind == "tpu7x" else 1)
        ):
            steps = zip(reversed(corner), host, reversed(offset), strict=True)
            coords = tuple(position * size + inner for position, size, inner in steps)
            devices.append(FakeDevice(len(devices), coords, process, KINDS[kind], piece, core))
    return devices
