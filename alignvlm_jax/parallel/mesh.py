"""The device mesh (data, fsdp, tensor): its sizes, and its devices in the order of their links."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from alignvlm_jax.config import MeshConfig, ModelConfig, TrainConfig
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


def resolve_sizes(
    mesh: MeshConfig,
    model: ModelConfig,
    train: TrainConfig | None,
    num_devices: int,
    num_slices: int = 1,
) -> Sizes:
    """Returns the sizes of a mesh, with one in the place of each -1.

    A mesh fits where its axes multiply to the number of devices, the sequences of a microbatch
    divide over data x fsdp, and `data` over the slices. Of those that fit, and agree with the sizes
    given, the one with the smallest tensor axis is taken, and of these the one with the largest
    fsdp axis. What parameters have along an axis of -1 must divide over it.

    Args:
      train: whose microbatches must divide; None: batches are made to fit the mesh.

    Raises:
      UserError: none fits; the message has the numbers and the nearest that does.
    """
    requested = _requested(mesh)
    if any(size < 1 and size != -1 for size in requested):
        raise UserError(
            f"config.mesh {requested}: each axis is at least 1, or -1: of tensor as little as "
            "fits, of fsdp as much as divides, of data all that is left"
        )
    candidates = list(_candidates(requested, num_devices))
    if not candidates:
        hint = _nearest(mesh, model, train, num_devices, num_slices)
        raise UserError(f"config.mesh {requested} does not fit {num_devices} devices{hint}")
    # One check after the other: what is told is the first that leaves no candidate.
    for check in _checks(mesh, model, train, num_slices):
        fitting = [sizes for sizes in candidates if not check(sizes)]
        if not fitting:
            wrong = check(candidates[0])
            hint = _nearest(mesh, model, train, num_devices, num_slices)
            raise UserError(f"config.mesh {requested} on {num_devices} devices: {wrong}{hint}")
        candidates = fitting
    return candidates[0]


def largest_fsdp(model: ModelConfig, num_devices: int) -> int:
    """Returns the largest fsdp axis, of at most so many devices, over which every parameter
    divides."""
    # An axis that divides every width divides their greatest common divisor.
    common = math.gcd(*_widths(model).values())
    return max(size for size in _divisors(common) if size <= num_devices)


def _requested(mesh: MeshConfig) -> Sizes:
    return Sizes(mesh.data, mesh.fsdp, mesh.tensor)


def _candidates(requested: Sizes, num_devices: int) -> Iterator[Sizes]:
    """Meshes of so many devices that agree with the sizes asked for, the best first."""
    divisors = _divisors(num_devices)
    # Small tensor axes before large ones, and among these large fsdp axes first.
    for tensor, fsdp in itertools.product(divisors, reversed(divisors)):
        if num_devices % (tensor * fsdp) == 0:
            sizes = Sizes(num_devices // (tensor * fsdp), fsdp, tensor)
            if all(want in (-1, size) for want, size in zip(requested, sizes, strict=True)):
                yield sizes


def _checks(
    mesh: MeshConfig, model: ModelConfig, train: TrainConfig | None, num_slices: int
) -> tuple[Callable[[Sizes], str], ...]:
    """What sizes must hold to, in the order in which it is told: each says what is wrong with some,
    "" for nothing."""
    checks = (
        functools.partial(_undivided, mesh, model),
        functools.partial(_across_slices, num_slices),
    )
    return checks if train is None else (*checks, functools.partial(_batch_left_over, train))


def _undivided(mesh: MeshConfig, model: ModelConfig, sizes: Sizes) -> str:
    """Returns what does not divide over an axis that was left open. Of a size that is given
    `sharding.tree_sharding` says it, with the parameter's path."""
    for axis, dimensions in (("fsdp", _widths(model)), ("tensor", _heads(model))):
        size = getattr(sizes, axis)
        over = [f"config.{name} {value}" for name, value in dimensions.items() if value % size]
        if over and getattr(mesh, axis) == -1:
            return f"{axis} would be {size}, of which {' and '.join(over)} is no multiple"
    return ""


def _across_slices(num_slices: int, sizes: Sizes) -> str:
    if sizes.data % num_slices == 0:
        return ""
    return (
        f"data {sizes.data} does not divide over {num_slices} slices; parameters are not "
        "sharded across them"
    )


def _batch_left_over(train: TrainConfig, sizes: Sizes) -> str:
    data_parallel_size = sizes.data * sizes.fsdp
    microbatch = train.batch_size // train.grad_accum_steps
    if microbatch % data_parallel_size == 0:
        return ""
    fewer = [
        steps
        for steps in _divisors(train.grad_accum_steps)
        if train.batch_size % (steps * data_parallel_size) == 0
    ]
    # The most steps that divide, and so the least memory of those that fit.
    changes = [f"--config.train.grad_accum_steps={fewer[-1]}"] if fewer else []
    nearest = max(round(microbatch / data_parallel_size), 1) * data_parallel_size
    changes.append(f"--config.train.batch_size={nearest * train.grad_accum_steps}")
    return (
        f"a microbatch of {microbatch} (train.batch_size {train.batch_size} / grad_accum_steps "
        f"{train.grad_accum_steps}) does not divide over data x fsdp = {data_parallel_size}; "
        f"nearest that does: {' or '.join(changes)}"
    )


def _nearest(
    mesh: MeshConfig,
    model: ModelConfig,
    train: TrainConfig | None,
    num_devices: int,
    num_slices: int,
) -> str:
    """What to change of the mesh alone, so that it fits; nothing where no mesh does."""
    # As if every axis were open: a size that is proposed must divide the parameters, too.
    checks = _checks(ALL_OPEN, model, train, num_slices)
    for axes in OPENED:
        opened = dataclasses.replace(mesh, **dict.fromkeys(axes, -1))
        for sizes in _candidates(_requested(opened), num_devices):
            if not any(check(sizes) for check in checks):
                flags = [
                    f"--config.mesh.{a}={getattr(sizes, a)}" for a in axes if getattr(mesh, a) != -1
                ]
                return f"; with {' '.join(flags)} the mesh is {sizes}"
    return ""


def _widths(model: ModelConfig) -> dict[str, int]:
    """The dimensions that the sharding rules put on fsdp, with any connector."""
    return {"model.llm.width": model.llm.width, "model.vision.width": model.vision.width}


def _heads(model: ModelConfig) -> dict[str, int]:
    """The dimensions that the sharding rules put on tensor.

    Those of connectors are multiples of these, but for what they name.
    """
    llm = model.llm
    vision = model.vision
    dimensions = {
        "model.llm.num_heads": llm.num_heads,
        "model.llm.num_kv_heads": llm.num_kv_heads,
        "model.llm.vocab_size": llm.vocab_size,
        "model.llm.mlp_width": llm.mlp_width,
        "model.vision.num_heads": vision.num_heads,
        "model.vision.mlp_width": vision.mlp_width,
    }
    return dimensions | {
        f"model.connector.{option}": size for option, size in model.connector.tensor_sizes().items()
    }


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


AXES = Sizes._fields


def make_mesh(
    mesh: MeshConfig,
    model: ModelConfig,
    train: TrainConfig | None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns the mesh that a config asks for, over all devices by default.

    Raises:
      UserError: none fits the devices, the batch and the model (`resolve_sizes`).
    """
    devices = jax.devices() if devices is None else devices
    return _mesh(resolve_sizes(mesh, model, train, len(devices), _num_slices(devices)), devices)


def abstract(
    mesh: MeshConfig,
    model: ModelConfig,
    train: TrainConfig | None,
    num_devices: int,
    num_slices: int = 1,
) -> AbstractMesh:
    """Returns the mesh that a config asks for over devices that need not be there; UserError as
    `make_mesh`."""
    sizes = resolve_sizes(mesh, model, train, num_devices, num_slices)
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
    # The first shape lies within a slice, the second across slices: `data` alone crosses the
    # network.
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
    """Returns over how many devices the sequences of a batch are spread: it must divide the
    batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def single_device() -> Mesh:
    """Returns a mesh of one device of this process."""
    return _mesh((1, 1, 1), jax.local_devices()[:1])


def widest(model: ModelConfig) -> Mesh:
    """Returns the mesh that spreads each parameter as far as it divides, and holds what is left
    over as copies.

    A batch may be of any size. All devices take part, since some of a TPU slice's form no mesh and
    every process needs its own; only a single process off TPUs leaves out those that would hold
    nothing but copies.
    """
    devices = jax.devices()
    if devices[0].platform != "tpu" and jax.process_count() == 1:
        devices = devices[: largest_fsdp(model, len(devices))]
    return make_mesh(MeshConfig(data=-1, fsdp=-1, tensor=1), model, None, devices)


def for_inference(mesh: MeshConfig, model: ModelConfig) -> Mesh:
    """Returns the mesh of training where it fits these devices, else the widest; the batch of
    training does not count."""
    try:
        return make_mesh(mesh, model, None)
    except UserError:
        return widest(model)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Enters the mesh and the rules. `with mesh:` would silently drop every logical constraint."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh
