"""Shardings of parameters, state and batches: the rules from logical axes to mesh axes.

This is the only file that builds NamedSharding.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignvlm_jax.errors import UserError, nearest

BATCH_AXES = ("data", "fsdp")
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # Activations.
    ("act_batch", BATCH_AXES),
    ("act_len", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
    # Parameters of both towers; where two axes of one array name the same mesh axis, the first
    # takes it.
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vis_heads", "tensor"),
    ("mlp", "tensor"),
    ("vis_mlp", "tensor"),
    ("embed", "fsdp"),
    ("vis_embed", "fsdp"),
    ("layers", None),
    ("head_dim", None),
    ("patch", None),
)


def tree_sharding(boxed: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every leaf of an abstract tree whose arrays are boxed with their
    logical axes.

    Leaves without a box are replicated. The result has the structure of the unboxed tree.

    Raises:
      UserError: a sharded dimension does not divide over its mesh axes (jax never pads), or a
        logical axis is not in RULES (linen would replicate it silently).
    """
    logical = nn.get_partition_spec(boxed)
    jax.tree_util.tree_map_with_path(
        _check_names, logical, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    shardings = nn.logical_to_mesh_sharding(logical, mesh, RULES)
    jax.tree_util.tree_map_with_path(_check_divides, unbox(boxed), shardings)
    return shardings


def unbox(boxed: Any) -> Any:
    """Returns the tree without its boxes of logical axes.

    nn.meta.unbox would also constrain each array to the mesh entered, which fails for abstract
    arrays.
    """
    return nn.meta.map_axis_meta(lambda box: box.unbox(apply_constraint=False), boxed)


def _check_names(path: tuple, logical: PartitionSpec) -> None:
    """Raises UserError where a logical axis of a leaf is not in RULES."""
    known = [name for name, _ in RULES]
    for name in logical:
        if name is not None and name not in known:
            raise UserError(
                f"{path_name(path)} has the unknown logical axis {name!r}{nearest(name, known)}"
            )


def _check_divides(path: tuple, array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> None:
    """Raises UserError where a dimension of a leaf does not divide over its mesh axes."""
    # A spec may be shorter than the shape: axes that it does not reach are not sharded.
    for size, axes in zip(array.shape, sharding.spec, strict=False):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        num_shards = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
        if size % num_shards:
            raise UserError(
                f"{path_name(path)} {array.shape}: dimension {size} does not divide over mesh axis "
                f"{' x '.join(axes)} of {num_shards}; lower config.mesh.{axes[0]} or change the "
                "model's size"
            )


def path_name(path: tuple) -> str:
    """Returns a tree path as text, such as "llm/blocks/attn/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batch arrays: the first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def of_axes(axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array with these logical axes."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(axes, RULES))


def rows_of_process(mesh: Mesh, size: int) -> np.ndarray:
    """Returns the indices, along a batch of `size`, that the devices of this process hold: int64
    [n], ascending.

    They need not be contiguous. On a real slice the mesh's axes lie along the links between chips,
    so that hosts stand in it as 0 1 2 3 0 1 2 3, say; and where the tensor axis crosses hosts,
    several hosts hold the same indices.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((size,))
    # Devices along `tensor` hold the same rows, which count once.
    return np.unique(np.concatenate([np.arange(size)[rows] for (rows,) in indices.values()]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the batch as global arrays sharded by `batch_sharding`.

    Args:
      batch: arrays [n, ...] with the indices of this process, in the order of `rows_of_process`.
      mesh: the mesh of all processes.
    """
    sharding = batch_sharding(mesh)
    num_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    # The global size follows from the local one: a batch with one index a shard tells which
    # fraction of it this process holds.
    num_local = len(rows_of_process(mesh, num_shards))

    def put(local: np.ndarray) -> jax.Array:
        size = len(local) * num_shards // num_local
        rows = rows_of_process(mesh, size)

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            # `index` is global, and `local` holds only this process's indices: a device's range is
            # contiguous in both, at another place.
            begin, end, _ = index[0].indices(size)
            start = np.searchsorted(rows, begin)
            return local[start : start + end - begin]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, of_device)

    # The training loop forbids implicit transfers, and with several processes jax takes this one
    # for implicit: it is the one that is meant.
    with jax.transfer_guard_host_to_device("allow"):
        return {name: put(array) for name, array in batch.items()}


def table(abstract: Any, shardings: Any) -> str:
    """Returns a table as text, one line for each array: path, shape, mesh axes, MiB on a device."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    rows = [("parameter", "shape", "sharded over", "MiB a device")]
    for (path, array), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        spec = " ".join(
            "-" if a is None else "+".join(a) if isinstance(a, tuple) else a for a in sharding.spec
        )
        local = np.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize / 2**20
        rows.append((path_name(path), "x".join(map(str, array.shape)), spec or "-", f"{local:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
