"""The device mesh (data, fsdp, tensor): its sizes, and its devices in the order of their links."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from alignvlm_jax.config import Config, MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel.sharding import RULES


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


def resolve_sizes(config: Config, num_devices: int, num_slices: int = 1) -> Sizes:
    """Returns `config.mesh` with a size in the place of each -1.

    A mesh fits where its axes multiply to the number of devices, the rows of a microbatch divide
    over data x fsdp, and `data` over the slices. Of those that fit, and agree with the sizes given,
    the one with the smallest tensor axis is taken, and of these the one with the largest fsdp axis.
    What parameters have along an axis of -1 must divide over it.

    Raises:
      UserError: none fits; the message has the numbers and the nearest that does.
    """
    requested = _requested(config.mesh)
    if any(size < 1 and size != -1 for size in requested):
        raise UserError(
            f"config.mesh {requested}: each axis is at least 1, or -1: of tensor as little as "
            "fits, of fsdp as much as divides, of data all that is left"
        )
    candidates = list(_candidates(requested, num_devices))
    if not candidates:
        hint = _nearest(config, num_devices, num_slices)
        raise UserError(f"config.mesh {requested} does not fit {num_devices} devices{hint}")
    for check in _CHECKS:
        fitting = [sizes for sizes in candidates if not check(config, sizes, num_slices)]
        if not fitting:
            wrong = check(config, candidates[0], num_slices)
            hint = _nearest(config, num_devices, num_slices)
            raise UserError(f"config.mesh {requested} on {num_devices} devices: {wrong}{hint}")
        candidates = fitting
    return candidates[0]


def largest_fsdp(config: Config, num_devices: int) -> int:
    """Returns the largest fsdp axis, of at most so many devices, over which every parameter
    divides."""
    common = math.gcd(*_widths(config).values())
    return max(size for size in _divisors(common) if size <= num_devices)


def _requested(mesh: MeshConfig) -> Sizes:
    return Sizes(mesh.data, mesh.fsdp, mesh.tensor)


def _candidates(requested: Sizes, num_devices: int) -> Iterator[Sizes]:
    """Meshes of so many devices that agree with the sizes asked for, the best first."""
    divisors = _divisors(num_devices)
    for tensor, fsdp in itertools.product(divisors, reversed(divisors)):
        if num_devices % (tensor * fsdp) == 0:
            sizes = Sizes(num_devices // (tensor * fsdp), fsdp, tensor)
            if all(want in (-1, size) for want, size in zip(requested, sizes, strict=True)):
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
    return (
        f"data {sizes.data} does not divide over {num_slices} slices; parameters are not "
        "sharded across them"
    )


def _batch_left_over(config: Config, sizes: Sizes, num_slices: int) -> str:
    train = config.train
    data_parallel_size = sizes.data * sizes.fsdp
    rows = train.batch_size // train.grad_accum_steps
    if rows % data_parallel_size == 0:
        return ""
    fewer = [
        steps
        for steps in _divisors(train.grad_accum_steps)
        if train.batch_size % (steps * data_parallel_size) == 0
    ]
    changes = [f"--config.train.grad_accum_steps={fewer[-1]}"] if fewer else []
    changes.append(
        f"--config.train.batch_size={max(round(rows / data_parallel_size), 1) * data_parallel_size * train.grad_accum_steps}"
    )
    return (
        f"a batch of {rows} rows (train.batch_size {train.batch_size} / accumulation "
        f"{train.grad_accum_steps}) does not divide over data x fsdp = {data_parallel_size}; "
        f"nearest that does: {' or '.join(changes)}"
    )


_CHECKS = (_undivided, _across_slices, _batch_left_over)


def _nearest(config: Config, num_devices: int, num_slices: int) -> str:
    """What to change of the mesh alone, so that it fits; nothing where no mesh does."""
    strict = dataclasses.replace(config, mesh=ALL_OPEN)
    for axes in OPENED:
        opened = dataclasses.replace(config.mesh, **dict.fromkeys(axes, -1))
        for sizes in _candidates(_requested(opened), num_devices):
            if not any(check(strict, sizes, num_slices) for check in _CHECKS):
                flags = [
                    f"--config.mesh.{a}={getattr(sizes, a)}"
                    for a in axes
                    if getattr(config.mesh, a) != -1
                ]
                return f"; with {' '.join(flags)} the mesh is {sizes}"
    return ""


def _widths(config: Config) -> dict[str, int]:
    """The dimensions that the sharding rules put on fsdp, with any connector."""
    return {
        "model.llm.width": config.model.llm.width,
        "model.vision.width": config.model.vision.width,
    }


def _heads(config: Config) -> dict[str, int]:
    """The dimensions that they put on tensor.

    Those of connectors are multiples of these, but for what they name.
    """
    llm = config.model.llm
    vision = config.model.vision
    connector = config.model.connector
    dimensions = {
        "model.llm.num_heads": llm.num_heads,
        "model.llm.num_kv_heads": llm.num_kv_heads,
        "model.llm.vocab_size": llm.vocab_size,
        "model.llm.mlp_width": llm.mlp_width,
        "model.vision.num_heads": vision.num_heads,
        "model.vision.mlp_width": vision.mlp_width,
    }
    return dimensions | {
        f"model.connector.{option}": size for option, size in connector.tensor_sizes().items()
    }


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


AXES = Sizes._fields


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that `config.mesh` asks for, over all devices by default.

    Raises:
      UserError: none fits the devices, the batch and the model (`resolve_sizes`).
    """
    devices = jax.devices() if devices is None else devices
    return _mesh(resolve_sizes(config, len(devices), _num_slices(devices)), devices)


def abstract(config: Config, num_devices: int, num_slices: int = 1) -> AbstractMesh:
    """Returns the mesh that `config.mesh` asks for over devices that need not be there; UserError
    as `make_mesh`."""
    sizes = resolve_sizes(config, num_devices, num_slices)
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh(sizes: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    # Linen's logical constraints need Auto axes; the default is Explicit.
    return Mesh(_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices, the axes of the mesh along a TPU's links.

    Not jax.make_mesh: it refuses two axes along one link, but on v5e, and devices of more than one
    slice, which is what it takes the nodes of a GPU cluster for.
    """
    data, *inner = sizes
    num_slices = _num_slices(devices)
    if num_slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // num_slices, *inner), (num_slices, 1, 1), devices, allow_split_physical_axes=True
    )


def _num_slices(devices: Sequence[jax.Device]) -> int:
    """Slices of TPUs; jax gives the nodes of GPUs a `slice_index`, too, across which fsdp may
    lie."""
    if devices[0].platform != "tpu":
        return 1
    # Devices that are only compiled for have a slice only where there are several.
    return len({getattr(device, "slice_index", 0) for device in devices})


def data_parallel_size(mesh: Mesh) -> int:
    """Returns over how many devices the rows of a batch are spread: it must divide the batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def single_device() -> Mesh:
    """Returns a mesh of one device of this process."""
    return _mesh((1, 1, 1), jax.local_devices()[:1])


def widest(config: Config) -> Mesh:
    """Returns the mesh that spreads each parameter as far as it divides, and holds what is left
    over as copies.

    A batch may have any number of rows. All devices take part, since a part of a TPU slice forms no
    mesh and every process needs its own; only a single process off TPUs leaves out those that would
    hold nothing but copies.
    """
    devices = jax.devices()
    if devices[0].platform != "tpu" and jax.process_count() == 1:
        devices = devices[: largest_fsdp(config, len(devices))]
    return make_mesh(
        _for_any_rows(config, MeshConfig(data=-1, fsdp=-1, tensor=1), len(devices)), devices
    )


def for_inference(config: Config) -> Mesh:
    """Returns the mesh of training where it fits these devices, else the widest; rows of a batch do
    not count."""
    try:
        return make_mesh(_for_any_rows(config, config.mesh, jax.device_count()))
    except UserError:
        return widest(config)


def _for_any_rows(config: Config, mesh: MeshConfig, rows: int) -> Config:
    """The config with a batch of as many rows as there are devices, which divides over any mesh of
    them."""
    train = dataclasses.replace(config.train, batch_size=rows, grad_accum_steps=1)
    return dataclasses.replace(config, mesh=mesh, train=train)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Enters the mesh and the rules. `with mesh:` would silently drop every logical constraint."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh
