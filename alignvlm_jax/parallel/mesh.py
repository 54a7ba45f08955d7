"""The device mesh (data, fsdp, tensor)."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel.sharding import RULES

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that `config.mesh` asks for, over all devices by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, the batch does not divide over data x fsdp, or
        these not over the processes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config, len(devices))
    ways, count = sizes[0] * sizes[1], jax.process_count()
    if ways % count:
        raise UserError(
            f"config.mesh: data x fsdp = {ways} does not divide over {count} processes, each of which reads its own "
            f"rows; lower config.mesh.tensor {sizes[2]}"
        )
    return _mesh(sizes, devices)


def abstract(config: Config, num_devices: int) -> AbstractMesh:
    """Returns the mesh that `config.mesh` asks for over devices that need not be there; UserError as `make_mesh`."""
    return AbstractMesh(tuple(_sizes(config, num_devices)), AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(config: Config, num_devices: int) -> list[int]:
    sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.tensor]
    asked = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"config.mesh {asked}: each axis is at least 1, and at most one of them is -1 (all that is left)"
        )
    if -1 in sizes:
        fixed = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(num_devices // fixed, 1)
    if math.prod(sizes) != num_devices:
        raise UserError(f"config.mesh {asked} does not fit {num_devices} devices; try data -1, fsdp 1, tensor 1")
    rows, ways = config.train.batch_size // config.train.accumulation, sizes[0] * sizes[1]
    if rows % ways:
        raise UserError(
            f"batch of {rows} rows (train.batch_size {config.train.batch_size} / accumulation "
            f"{config.train.accumulation}) does not divide over data x fsdp = {ways}; nearest that does: "
            f"{max(round(rows / ways), 1) * ways * config.train.accumulation}"
        )
    return sizes


def _mesh(sizes: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    # Linen's logical constraints need Auto axes; the default is Explicit.
    return Mesh(_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices, the axes of the mesh along a TPU's links.

    Not jax.make_mesh: it refuses two axes along one link, but on v5e, and devices of more than one slice, which is what
    it takes the nodes of a GPU cluster for.
    """
    data, *inner = sizes
    # Devices that are only compiled for have a slice only where there are several.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    if data % slices:
        raise UserError(
            f"config.mesh.data {data} does not divide over {slices} slices; parameters are not sharded across them, "
            f"nearest that does: {max(round(data / slices), 1) * slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def batch_ways(mesh: Mesh) -> int:
    """Returns over how many devices the rows of a batch are spread: it must divide the batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def single_device() -> Mesh:
    """Returns a mesh of one device of this process."""
    return _mesh((1, 1, 1), jax.local_devices()[:1])


def widest(fits: Callable[[Mesh], object]) -> Mesh:
    """Returns the mesh of as many devices as possible, all along fsdp, on which `fits` raises no UserError.

    Raises:
      UserError: that of a single device.
    """
    for count in range(jax.device_count(), 1, -1):
        mesh = _mesh((1, count, 1), jax.devices()[:count])
        with contextlib.suppress(UserError):
            fits(mesh)
            return mesh
    mesh = single_device()
    fits(mesh)
    return mesh


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Enters the mesh and the rules. `with mesh:` would silently drop every logical constraint."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh
