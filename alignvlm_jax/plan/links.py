"""How long a collective takes on the links of a slice: rings along its axes.

A slice is a grid of 2 or 3 axes, and a chip has a link to either neighbour on each. Where an axis
wraps around, a ring takes both of its links in both directions at once; where it does not, the
chips at its ends have one, which everything that they get has to come over. Latency is left out.
"""

import dataclasses
from collections.abc import Sequence

from alignvlm_jax.plan import hardware
from alignvlm_jax.plan.collectives import BETWEEN_SLICES, Collective
from alignvlm_jax.plan.hardware import Topology


@dataclasses.dataclass(frozen=True)
class Links:
    """The links of slices.

    `coordinates` are (x, y, z) of the devices, in the order of the program's device numbers; empty
    where they are not known, and every group is then taken to span a whole slice.
    """

    topology: Topology
    coordinates: Sequence[tuple[int, ...]] = ()

    def seconds(self, collective: Collective) -> float:
        """Returns the seconds of all runs of a collective."""
        sent = collective.times * collective.bytes
        if collective.kind == BETWEEN_SLICES:
            return sent / (hardware.NETWORK_GB * 1e9)
        if collective.kind == "collective-permute":
            # To a neighbour, and mostly two at a time, one in either direction of an axis.
            return sent / (2 * self._link)
        size = len(collective.group) or self.topology.devices_a_slice
        # All but a device's own part comes in over the links. What is summed passes twice: once to
        # add it up, once to hand it round.
        passes = 2 if collective.kind == "all-reduce" else 1
        return passes * sent * (size - 1) / size / self._bandwidth(collective.group)

    @property
    def _link(self) -> float:
        """Bytes a second of one link in one direction."""
        return self.topology.chip.link_gb * 1e9 / (2 * len(self.topology.sizes))

    def _bandwidth(self, group: tuple[int, ...]) -> float:
        """Bytes a second that come in at the device of a group that has the fewest links."""
        total = 0.0
        sizes = self.topology.sizes
        for axis, (size, wraps) in enumerate(zip(sizes, self.topology.wraps, strict=True)):
            spanned = size
            if group and self.coordinates:
                spanned = len({self.coordinates[device][axis] for device in group})
            if spanned > 1:
                total += self._link * (2 if wraps and spanned == size else 1)
        # Of two devices of one chip: the link between them, which is faster, is not counted.
        return total or self._link


def coordinates(devices: Sequence) -> list[tuple[int, ...]]:
    """Returns where the devices stand in their slice, [] where they do not know it, as CPUs do."""
    found = [tuple(getattr(device, "coords", ())) for device in devices]
    return found if all(found) else []
