"""How many devices lie along each axis of the mesh: what a config leaves open, and what does not divide."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from alignvlm_jax.config import Config, MeshConfig
from alignvlm_jax.errors import UserError


class Sizes(NamedTuple):
    """Devices along the axes of the mesh, or of those asked for, where -1 is open."""

    data: int
    fsdp: int
    tensor: int

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self._asdict().items())


ALL_OPEN = MeshConfig(data=-1, fsdp=-1, tensor=-1)
OPENED = (("data",), ("tensor",), ("data", "fsdp"), ("data", "tensor"), ("data", "fsdp", "tensor"))
"""Axes to open in turn where nothing fits: the fewest changes first."""


def resolve(config: Config, num_devices: int, num_slices: int = 1) -> Sizes:
    """Returns `config.mesh` with a size in the place of each -1.

    A mesh fits where its axes multiply to the number of devices, the rows of a microbatch divide
    over data x fsdp, and `data` over the slices. Of those that fit, and agree with the sizes given,
    the one with the smallest tensor axis is taken, and of these the one with the largest fsdp axis.
    What parameters have along an axis of -1 must divide over it.

    Raises:
      UserError: none fits; the message has the numbers and the nearest that does.
    """
    asked = _asked(config.mesh)
    if any(size < 1 and size != -1 for size in asked):
        raise UserError(
            f"config.mesh {asked}: each axis is at least 1, or -1: of tensor as little as fits, of "
            "fsdp as much as divides, of data all that is left"
        )
    candidates = list(_candidates(asked, num_devices))
    if not candidates:
        hint = _nearest(config, num_devices, num_slices)
        raise UserError(f"config.mesh {asked} does not fit {num_devices} devices{hint}")
    for check in _CHECKS:
        fitting = [sizes for sizes in candidates if not check(config, sizes, num_slices)]
        if not fitting:
            wrong = check(config, candidates[0], num_slices)
            hint = _nearest(config, num_devices, num_slices)
            raise UserError(f"config.mesh {asked} on {num_devices} devices: {wrong}{hint}")
        candidates = fitting
    return candidates[0]


def largest_fsdp(config: Config, num_devices: int) -> int:
    """Returns the largest fsdp axis, of at most so many devices, over which every parameter divides."""
    common = math.gcd(*_widths(config).values())
    return max(size for size in _divisors(common) if size <= num_devices)


def _asked(mesh: MeshConfig) -> Sizes:
    return Sizes(mesh.data, mesh.fsdp, mesh.tensor)


def _candidates(asked: Sizes, num_devices: int) -> Iterator[Sizes]:
    """Meshes of so many devices that agree with the sizes asked for, the best first."""
    divisors = _divisors(num_devices)
    for tensor, fsdp in itertools.product(divisors, reversed(divisors)):
        if num_devices % (tensor * fsdp) == 0:
            sizes = Sizes(num_devices // (tensor * fsdp), fsdp, tensor)
            if all(want in (-1, size) for want, size in zip(asked, sizes, strict=True)):
                yield sizes


def _undivided(config: Config, sizes: Sizes, num_slices: int) -> str:
    """What does not divide over an axis that was left open. Of a size that is given
    `sharding.tree_sharding` says it, with the parameter's path."""
    for axis, dimensions in (("fsdp", _widths(config)), ("tensor", _heads(config))):
        size = getattr(sizes, axis)
        over = [f"config.{name} {value}" for name, value in dimensions.items() if value % size]
        if over and getattr(config.mesh, axis) == -1:
            return f"{axis} would be {size}, of which {' and '.join(over)} is no multiple"
    return ""


def _across_slices(config: Config, sizes: Sizes, num_slices: int) -> str:
    if sizes.data % num_slices == 0:
        return ""
    return f"data {sizes.data} does not divide over {num_slices} slices; parameters are not sharded across them"


def _rows_left_over(config: Config, sizes: Sizes, num_slices: int) -> str:
    train, ways = config.train, sizes.data * sizes.fsdp
    rows = train.batch_size // train.accumulation
    if rows % ways == 0:
        return ""
    fewer = [parts for parts in _divisors(train.accumulation) if train.batch_size % (parts * ways) == 0]
    changes = [f"--config.train.accumulation={fewer[-1]}"] if fewer else []
    changes.append(f"--config.train.batch_size={max(round(rows / ways), 1) * ways * train.accumulation}")
    return (
        f"a batch of {rows} rows (train.batch_size {train.batch_size} / accumulation {train.accumulation}) "
        f"does not divide over data x fsdp = {ways}; nearest that does: {' or '.join(changes)}"
    )


_CHECKS = (_undivided, _across_slices, _rows_left_over)


def _nearest(config: Config, num_devices: int, num_slices: int) -> str:
    """What to change of the mesh alone, so that it fits; nothing where no mesh does."""
    strict = dataclasses.replace(config, mesh=ALL_OPEN)
    for axes in OPENED:
        opened = dataclasses.replace(config.mesh, **dict.fromkeys(axes, -1))
        for sizes in _candidates(_asked(opened), num_devices):
            if not any(check(strict, sizes, num_slices) for check in _CHECKS):
                flags = [f"--config.mesh.{a}={getattr(sizes, a)}" for a in axes if getattr(config.mesh, a) != -1]
                return f"; with {' '.join(flags)} the mesh is {sizes}"
    return ""


def _widths(config: Config) -> dict[str, int]:
    """The dimensions that the sharding rules put on fsdp, with any connector."""
    return {"model.llm.width": config.model.llm.width, "model.vision.width": config.model.vision.width}


def _heads(config: Config) -> dict[str, int]:
    """The dimensions that they put on tensor. Those of connectors are multiples of these, but for ovis's table."""
    llm, vision, connector = config.model.llm, config.model.vision, config.model.connector
    dimensions = {
        "model.llm.num_heads": llm.num_heads,
        "model.llm.num_kv_heads": llm.num_kv_heads,
        "model.llm.vocab_size": llm.vocab_size,
        "model.llm.mlp_width": llm.mlp_width,
        "model.vision.num_heads": vision.num_heads,
        "model.vision.mlp_width": vision.mlp_width,
    }
    if connector.name == "ovis":
        dimensions["model.connector.visual_vocab_size"] = connector.visual_vocab_size
    return dimensions


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
