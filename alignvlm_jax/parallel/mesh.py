"""The device mesh (data, fsdp, tensor)."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from alignvlm_jax.config import Config, MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import mesh_sizes
from alignvlm_jax.parallel.mesh_sizes import Sizes
from alignvlm_jax.parallel.sharding import RULES

AXES = Sizes._fields


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that `config.mesh` asks for, over all devices by default.

    Raises:
      UserError: none fits the devices, the batch and the model (`mesh_sizes.resolve`).
    """
    devices = jax.devices() if devices is None else devices
    return _mesh(mesh_sizes.resolve(config, len(devices), _num_slices(devices)), devices)


def abstract(config: Config, num_devices: int, num_slices: int = 1) -> AbstractMesh:
    """Returns the mesh that `config.mesh` asks for over devices that need not be there; UserError as `make_mesh`."""
    sizes = mesh_sizes.resolve(config, num_devices, num_slices)
    return AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def _mesh(sizes: Sequence[int], devices: Sequence[jax.Device]) -> Mesh:
    # Linen's logical constraints need Auto axes; the default is Explicit.
    return Mesh(_grid(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices, the axes of the mesh along a TPU's links.

    Not jax.make_mesh: it refuses two axes along one link, but on v5e, and devices of more than one slice, which is what
    it takes the nodes of a GPU cluster for.
    """
    data, *inner = sizes
    num_slices = _num_slices(devices)
    if num_slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // num_slices, *inner), (num_slices, 1, 1), devices, allow_split_physical_axes=True
    )


def _num_slices(devices: Sequence[jax.Device]) -> int:
    """Slices of TPUs; jax gives the nodes of GPUs a `slice_index`, too, across which fsdp may lie."""
    if devices[0].platform != "tpu":
        return 1
    # Devices that are only compiled for have a slice only where there are several.
    return len({getattr(device, "slice_index", 0) for device in devices})


def batch_ways(mesh: Mesh) -> int:
    """Returns over how many devices the rows of a batch are spread: it must divide the batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def single_device() -> Mesh:
    """Returns a mesh of one device of this process."""
    return _mesh((1, 1, 1), jax.local_devices()[:1])


def widest(config: Config) -> Mesh:
    """Returns the mesh that spreads each parameter as far as it divides, and holds what is left over as copies.

    A batch may have any number of rows. All devices take part, since a part of a TPU slice forms no mesh and every
    process needs its own; only a single process off TPUs leaves out those that would hold nothing but copies.
    """
    devices = jax.devices()
    if devices[0].platform != "tpu" and jax.process_count() == 1:
        devices = devices[: mesh_sizes.largest_fsdp(config, len(devices))]
    return make_mesh(_for_any_rows(config, MeshConfig(data=-1, fsdp=-1, tensor=1), len(devices)), devices)


def for_inference(config: Config) -> Mesh:
    """Returns the mesh of training where it fits these devices, else the widest; rows of a batch do not count."""
    try:
        return make_mesh(_for_any_rows(config, config.mesh, jax.device_count()))
    except UserError:
        return widest(config)


def _for_any_rows(config: Config, mesh: MeshConfig, rows: int) -> Config:
    """The config with a batch of as many rows as there are devices, which divides over any mesh of them."""
    train = dataclasses.replace(config.train, batch_size=rows, accumulation=1)
    return dataclasses.replace(config, mesh=mesh, train=train)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Enters the mesh and the rules. `with mesh:` would silently drop every logical constraint."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh
