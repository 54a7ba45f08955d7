"""Chunked functions of rows: an intermediate [rows, V] too large for memory exists for one chunk of
rows at a time, and is computed again in the backward pass.

Rows are split over the mesh axes of `act_batch`, and within a shard into chunks. The matrices that
all rows share are gathered once, before the chunks; their gradients are summed over the chunks in
float32, and over the shards once, after the chunks. The partitioner by itself would sum over the
shards in every chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from alignvlm_jax.shapes import Array, Float


class Matrix(NamedTuple):
    """A matrix for `project`: `value` in the dtype of the computation, and its float32 `master`,
    which takes no part in the forward pass and receives the gradient."""

    value: Float[Array, "..."]
    master: Float[Array, "..."]

    @classmethod
    def of(cls, master: Float[Array, "..."], dtype: DTypeLike) -> "Matrix":
        """Returns the matrix of a float32 master, cast to `dtype` once for all chunks."""
        # Differentiating through the cast would round the gradient to `dtype` on its way.
        return cls(jax.lax.stop_gradient(master.astype(dtype)), master.astype(jnp.float32))


# A custom derivative, since the scan over chunks sums an array's cotangents in the array's own
# dtype: bfloat16 for `value`, float32 for `master`. So the gradient goes to `master`, of which the
# forward pass has no use.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(
    equation: str, x: Float[Array, "..."], value: Float[Array, "..."], master: Float[Array, "..."]
) -> Float[Array, "..."]:
    del master
    return jnp.einsum(equation, x, value, preferred_element_type=jnp.float32)


def _project_forward(
    equation: str, x: Float[Array, "..."], value: Float[Array, "..."], master: Float[Array, "..."]
) -> tuple[Float[Array, "..."], tuple[Float[Array, "..."], Float[Array, "..."]]]:
    return _project(equation, x, value, master), (x, value)


def _project_backward(
    equation: str, saved: tuple[Float[Array, "..."], Float[Array, "..."]], dout: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    x, value = saved
    (rows, matrix) = equation.split("->")[0].split(",")
    out = equation.split("->")[1]
    # Both operands in the dtype of the computation: a float32 one would take the whole matmul off
    # the matrix unit's fast path.
    dout = dout.astype(value.dtype)
    # Of "ND,DV->NV" these are "NV,DV->ND" and "ND,NV->DV".
    dx = jnp.einsum(
        f"{out},{matrix}->{rows}", dout, value, preferred_element_type=jnp.float32
    ).astype(x.dtype)
    dmatrix = jnp.einsum(f"{rows},{out}->{matrix}", x, dout, preferred_element_type=jnp.float32)
    # `value` stands behind a stop_gradient, so that its cotangent goes nowhere; zeros have its
    # shape.
    return dx, jnp.zeros_like(value), dmatrix


_project.defvjp(_project_forward, _project_backward)


def project(equation: str, x: Float[Array, "..."], matrix: Matrix) -> Float[Array, "..."]:
    """Returns the einsum of x and the matrix, accumulated and returned in float32.

    Gradients are those of jnp.einsum, except that the matrix's is float32 where the computation is
    bfloat16: a bfloat16 sum over hundreds of chunks would lose most of it.
    """
    return _project(equation, x, *matrix)


def rows_per_chunk(impl: str, chunk_size_mib: float, num_rows: int, num_columns: int) -> int | None:
    """Returns the rows of a shard that a chunk holds, of at most `chunk_size_mib` MiB of float32;
    None stands for the plain form, all rows at once.

    Args:
      impl: "plain", "chunked", or "auto": chunked where a shard has more rows than a chunk.
      chunk_size_mib: MiB of one chunk on one device.
      num_rows: rows of all shards together.
      num_columns: columns of all shards of `act_vocab` together.
    """
    if impl == "plain":
        return None
    # With 64 MiB, 128,256 columns on one device leave 130 rows, of which a chunk takes 128.
    rows = math.ceil(num_rows / num_shards("act_batch"))
    fits = max(int(chunk_size_mib * 2**20 / (4 * num_columns / num_shards("act_vocab"))), 1)
    if impl == "auto" and rows <= fits:
        return None
    # Multiples of 128 fill the matrix unit's tiles.
    return min(rows, fits - fits % 128 if fits > 128 else fits)


def map_rows(
    fn: Callable[[Any, Any, str | None], Any], rows: Any, shared: Any, chunk: int | None
) -> Any:
    """Returns fn(rows, shared, row_axis), a tree of arrays [N, ...], computed in chunks of rows.

    Args:
      fn: maps rows and shared to a tree of arrays with one row for each row given. `row_axis` is
        the logical axis of those rows, for fn's sharding constraints: None inside a chunk.
      rows: tree of arrays [N, ...], sharded by `act_batch`.
      shared: tree of arrays that all rows share.
      chunk: rows of a shard that are computed at a time; None computes all rows at once, and saves
        for the backward pass what it needs.
    """
    if chunk is None:
        return fn(rows, shared, "act_batch")
    row_axes = _mesh_axes("act_batch")
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    # Rows that do not divide cannot enter a shard_map, and are left to the partitioner.
    if num_rows % num_shards("act_batch") or not row_axes:
        return _map_chunks(fn, rows, shared, chunk)
    # Only the row axes are manual. `shared` comes in whole along them, so that the transpose sums
    # its gradient over the shards once, after the scan. Along `tensor` it stays split, which is
    # left to the partitioner: an all_gather of our own, inside, would gather it along `tensor` too.
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
    """Returns fn of one shard's rows, chunk after chunk; zeros fill up the last chunk, and what fn
    makes of them is cut off."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    num_chunks = math.ceil(num_rows / chunk)

    def split(x: Array) -> Array:
        # [N, ...] -> [chunks, chunk, ...]: `lax.map` needs chunks of one shape.
        x = jnp.pad(x, ((0, num_chunks * chunk - num_rows), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, chunk, *x.shape[1:])

    # The checkpoint keeps the scan from saving [chunk, V] of every chunk, all of [N, V]. A scan
    # separates forward from backward by itself, so no barrier against CSE is needed.
    one_chunk = jax.checkpoint(lambda rows: fn(rows, shared, None), prevent_cse=False)
    outputs = jax.lax.map(one_chunk, jax.tree.map(split, rows))
    return jax.tree.map(lambda x: x.reshape(num_chunks * chunk, *x.shape[2:])[:num_rows], outputs)


def _mesh_axes(logical: str) -> tuple[str, ...]:
    """Returns the axes of the mesh entered over which `logical` is sharded, without axes of size
    1."""
    # One mesh axis comes as a string, several as a tuple, none as None.
    (axes,) = nn.logical_to_mesh_axes((logical,))
    axes = (axes,) if isinstance(axes, str) else axes or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


def num_shards(logical: str) -> int:
    """Returns the number of shards that the mesh entered cuts the logical axis into; 1 without a
    mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in _mesh_axes(logical))
