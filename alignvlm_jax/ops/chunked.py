"""Functions of rows whose intermediate [rows, V] is too large to exist: mapped over blocks of rows,
each computed again in the backward pass.

The rows are split over the mesh axes of `act_batch`, and within a shard into blocks. What all rows
share, the matrices, is gathered once, before the blocks; their gradients are summed over the blocks
in float32 and over the shards once, after the blocks. Left to the partitioner, that sum would be
made in every block.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from alignvlm_jax.shapes import Array, Float


class Matrix(NamedTuple):
    """A matrix for `project`: its `value` in the dtype of the computation, and a float32 array for
    its gradient."""

    value: Float[Array, "..."]
    master: Float[Array, "..."]

    @classmethod
    def of(cls, master: Float[Array, "..."], dtype: jnp.dtype) -> "Matrix":
        """Casts once what every block would cast again; the gradient reaches `master` without being
        rounded."""
        return cls(jax.lax.stop_gradient(master.astype(dtype)), master.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(equation: str, x: Array, value: Array, master: Array) -> Array:
    del master
    return jnp.einsum(equation, x, value, preferred_element_type=jnp.float32)


def _project_forward(
    equation: str, x: Array, value: Array, master: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _project(equation, x, value, master), (x, value)


def _project_backward(
    equation: str, saved: tuple[Array, Array], dout: Array
) -> tuple[Array, Array, Array]:
    x, value = saved
    (rows, matrix) = equation.split("->")[0].split(",")
    out = equation.split("->")[1]
    dout = dout.astype(value.dtype)
    dx = jnp.einsum(
        f"{out},{matrix}->{rows}", dout, value, preferred_element_type=jnp.float32
    ).astype(x.dtype)
    dmatrix = jnp.einsum(f"{rows},{out}->{matrix}", x, dout, preferred_element_type=jnp.float32)
    return dx, jnp.zeros_like(value), dmatrix


_project.defvjp(_project_forward, _project_backward)


def project(equation: str, x: Float[Array, "..."], matrix: Matrix) -> Float[Array, "..."]:
    """Returns the einsum of x and the matrix in float32. Equal to jnp.einsum, gradients too, but
    that the matrix's is float32 where the computation is bfloat16: a sum over hundreds of blocks
    would lose most of it."""
    return _project(equation, x, *matrix)


def rows_per_chunk(impl: str, chunk_size_mib: float, num_rows: int, num_columns: int) -> int | None:
    """Returns how many rows of a shard make a block of at most `chunk_size_mib` MiB of float32;
    None is the plain form.

    Args:
      form: "plain", "chunked", or "auto": chunked where a shard has more rows than a block.
      chunk_size_mib: of one block on one device.
      num_rows: over all shards.
      num_columns: over all shards of `act_vocab`.
    """
    if impl == "plain":
        return None
    rows = math.ceil(num_rows / num_shards("act_batch"))
    fits = max(int(chunk_size_mib * 2**20 / (4 * num_columns / num_shards("act_vocab"))), 1)
    if impl == "auto" and rows <= fits:
        return None
    # Whole tiles of the matrix unit.
    return min(rows, fits - fits % 128 if fits > 128 else fits)


def map_rows(
    fn: Callable[[Any, Any, str | None], Any], rows: Any, shared: Any, chunk: int | None
) -> Any:
    """Returns fn(rows, shared, row_axis), of a tree of arrays [N, ...] and for each of their rows.

    Args:
      fn: maps rows and shared to a tree of arrays with a row for each row. `row_axis` is the
        logical axis of the rows it is given, for its sharding constraints.
      rows: tree of arrays [N, ...], sharded by `act_batch`.
      shared: tree of arrays that all rows share.
      block: rows of a shard that are computed at a time; None computes all at once, and saves what
        it needs.
    """
    if chunk is None:
        return fn(rows, shared, "act_batch")
    row_axes = _mesh_axes("act_batch")
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    if num_rows % num_shards("act_batch") or not row_axes:
        return _map_chunks(fn, rows, shared, chunk)
    # `shared` comes in whole along the axes of the rows, and stays split along `tensor`, which is
    # left to the partitioner: an all_gather of our own, inside, would have it gathered along
    # `tensor` too.
    return jax.shard_map(
        lambda rows, shared: _map_chunks(fn, rows, shared, chunk),
        in_specs=(PartitionSpec(row_axes), PartitionSpec()),
        out_specs=PartitionSpec(row_axes),
        axis_names=set(row_axes),
        check_vma=False,
    )(rows, shared)


def _map_chunks(
    fn: Callable[[Any, Any, str | None], Any], rows: Any, shared: Any, chunk: int
) -> Any:
    """Over blocks of one shard's rows; the last block is filled up with zeros."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    num_chunks = math.ceil(num_rows / chunk)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, num_chunks * chunk - num_rows), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, chunk, *x.shape[1:])

    # A scan separates forward from backward by itself.
    one_chunk = jax.checkpoint(lambda rows: fn(rows, shared, None), prevent_cse=False)
    outputs = jax.lax.map(one_chunk, jax.tree.map(split, rows))
    return jax.tree.map(lambda x: x.reshape(num_chunks * chunk, *x.shape[2:])[:num_rows], outputs)


def _mesh_axes(logical: str) -> tuple[str, ...]:
    """Axes of the mesh entered over which `logical` is sharded; those of size 1 are left out."""
    (axes,) = nn.logical_to_mesh_axes((logical,))
    axes = (axes,) if isinstance(axes, str) else axes or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def num_shards(logical: str) -> int:
    """Returns into how many shards the mesh entered splits an axis of the name `logical`; 1 without
    a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in _mesh_axes(logical))
