"""What a device holds of a softmax over a sharded vocabulary (`ops.chunked`): its rows, its columns
in chunks, and the statistics of the columns that LN over the vocabulary needs.

All axes of the mesh are manual here: W and E are gathered along their widths by all-gathers, and
gradients reduce-scattered. Letters: `shapes.py`; n and v are a shard's rows and columns, c a
chunk's columns.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from alignvlm_jax.shapes import Array, Float, Int

# No label has it, as many have -1.
REPEATED = np.iinfo(np.int32).min


class Inputs(NamedTuple):
    """What the softmax is of; None for what is left out.

    Attributes:
      x: rows, in the dtype of the computation.
      head: W, a parameter; [V, D] with `Options.is_table`.
      table: E, a parameter. None: no average is made.
      scale, bias: of LN. None: there is no LN.
    """

    x: Float[Array, "n D"]
    head: Float[Array, "..."]
    table: Float[Array, "v width"] | None = None
    scale: Float[Array, "v"] | None = None
    bias: Float[Array, "v"] | None = None


class Outputs(NamedTuple):
    """Of each row: the average, in the dtype of x; the logits of its labels; the log of the sum
    that normalises P; and the largest logit of an entry that may have weight, which hands no
    gradient on."""

    average: Float[Array, "n out_width"] | None
    label_logits: Float[Array, "n k"]
    log_sum_exp: Float[Array, "n"]
    largest: Float[Array, "n"]


class Options(NamedTuple):
    """How the softmax is made.

    Attributes:
      chunk: columns of a shard at a time, see `columns_per_chunk`.
      num_valid: the columns from here on only pad the table, and take no part in LN.
      eps: LN's.
      linear: weights are z / sqrt(number of entries) in the place of P.
      is_table: the head is [V, D].
      top_k: entries of a row that have weight in its average, the likeliest; 0: all.
    """

    chunk: int
    num_valid: int
    eps: float = 0.0
    linear: bool = False
    is_table: bool = False
    top_k: int = 0

    @property
    def head_letters(self) -> str:
        return "VD" if self.is_table else "DV"

    @property
    def chunk_letters(self) -> str:
        """Of the head's columns in a chunk."""
        return "cD" if self.is_table else "Dc"


def mesh_axes(logical: str) -> tuple[str, ...]:
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
    return math.prod(sizes[axis] for axis in mesh_axes(logical))


def on_shards(fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns fn run by each device of the mesh entered on its shards, all axes manual."""
    if not jax.sharding.get_abstract_mesh().shape:
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather(x: Array, axes: tuple[str, ...], axis: int) -> Array:
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def psum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def scatter(x: Array, axes: tuple[str, ...], axis: int) -> Array:
    """Returns a shard, along `axis`, of the sum over the mesh axes."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=axis, tiled=True) if axes else x


def without(axes: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in others)


class Axes(NamedTuple):
    """Mesh axes, without those of size 1, over which rows, the head's D, the table's width and the
    vocabulary are sharded."""

    rows: tuple[str, ...]
    head_embed: tuple[str, ...]
    table_embed: tuple[str, ...]
    vocab: tuple[str, ...]

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> "Axes":
        def dividing(logical: str, size: int) -> tuple[str, ...]:
            # What does not divide is no parameter of a model, whose widths are checked.
            return mesh_axes(logical) if size % num_shards(logical) == 0 else ()

        head_width, vocab_size = inputs.head.shape[:: -1 if options.is_table else 1]
        table_width = 1 if inputs.table is None else inputs.table.shape[1]
        return cls(
            mesh_axes("act_batch"),
            dividing("embed", head_width),
            dividing("embed", table_width),
            dividing("vocab", vocab_size),
        )

    def of_inputs(self, options: Options) -> Any:
        """Returns Inputs of PartitionSpecs."""
        head = {"D": self.head_embed, "V": self.vocab}
        return Inputs(
            PartitionSpec(self.rows),
            PartitionSpec(*(head[letter] for letter in options.head_letters)),
            PartitionSpec(self.vocab, self.table_embed),
            PartitionSpec(self.vocab),
            PartitionSpec(self.vocab),
        )


def sum_scattered(x: Float[Array, "D ..."], axes: Axes) -> Float[Array, "d ..."]:
    """Returns a shard of the sum over all shards of rows."""
    return psum(scatter(x, axes.head_embed, 0), without(axes.rows, axes.head_embed))


class Chunk(NamedTuple):
    """A chunk of c columns of a shard, with what belongs to them."""

    head: Float[Array, "..."]
    table: Float[Array, "c out_width"] | None
    scale: Float[Array, "c"] | None
    bias: Float[Array, "c"] | None
    mask: Float[Array, "c"]  # Added to logits: 0, or -inf for an entry that has no weight.
    ids: Int[Array, "c"]  # Vocabulary entries; REPEATED where the chunk before has the column.


class Columns(NamedTuple):
    """A shard's columns, whose W and E are gathered along their widths."""

    whole: Chunk
    chunk: int
    is_table: bool

    @classmethod
    def of(cls, inputs: Inputs, mask: Float[Array, "v"], axes: Axes, options: Options) -> "Columns":
        dtype = inputs.x.dtype
        # The cast comes first: bfloat16 is half of what a gather sends.
        head = gather(inputs.head.astype(dtype), axes.head_embed, options.head_letters.index("D"))
        table = inputs.table
        if table is not None:
            table = gather(table.astype(dtype), axes.table_embed, 1)
        first = jax.lax.axis_index(axes.vocab) * mask.size if axes.vocab else 0
        ids = first + jnp.arange(mask.size)
        whole = Chunk(head, table, inputs.scale, inputs.bias, mask, ids)
        return cls(whole, min(options.chunk, mask.size), options.is_table)

    def without_table(self) -> "tuple[Columns, Float[Array, 'v out_width']]":
        """Returns the columns without their rows of E, and these."""
        whole = self.whole._replace(table=None)
        return self._replace(whole=whole), self.whole.table

    @property
    def first(self) -> Int[Array, ""]:
        """Entry of the shard's first column."""
        return self.whole.ids[0]

    @property
    def number(self) -> int:
        """Number of chunks."""
        return math.ceil(self.whole.ids.size / self.chunk)

    def take(self, index: Int[Array, ""]) -> Chunk:
        """Returns a chunk. The last one begins early enough to be whole; columns that the one
        before has had are of no entry there, and have no weight."""
        start = jnp.minimum(index * self.chunk, self.whole.ids.size - self.chunk)

        def slice_of(x: Array, axis: int = 0) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, self.chunk, axis)

        chunk = jax.tree.map(slice_of, self.whole._replace(head=None))
        chunk = chunk._replace(head=slice_of(self.whole.head, 0 if self.is_table else 1))
        chunk = jax.lax.optimization_barrier(chunk)
        is_new = start + jnp.arange(self.chunk) >= index * self.chunk
        return chunk._replace(
            mask=jnp.where(is_new, chunk.mask, -jnp.inf), ids=jnp.where(is_new, chunk.ids, REPEATED)
        )

    def joined(self, parts: Array, axis: int) -> Array:
        """Returns what all chunks have made, [chunks, ..., c, ...], with the columns along `axis`
        and each once."""
        parts = jnp.moveaxis(parts, axis + 1, 1)  # [chunks, c, ...]
        repeated = self.number * self.chunk - self.whole.ids.size
        before = parts[:-1].reshape(-1, *parts.shape[2:])
        return jnp.moveaxis(jnp.concatenate([before, parts[-1, repeated:]]), 0, axis)


class Statistics(NamedTuple):
    """Mean and covariance of W's columns, without those of padding."""

    mean: Float[Array, "D"]
    covariance: Float[Array, "D D"]

    @classmethod
    def of(cls, columns: Columns, axes: Axes, options: Options) -> "Statistics":
        """Returns both; each device that has the same columns makes a part of the sums."""
        head = columns.whole.head if options.is_table else columns.whole.head.T  # [v, D]
        num_shards_here = math.prod(jax.lax.axis_size(axis) for axis in axes.head_embed)
        size = math.ceil(head.shape[0] / num_shards_here)
        index = jax.lax.axis_index(axes.head_embed) if axes.head_embed else 0
        begin = jnp.minimum(index * size, head.shape[0] - size)
        part = jax.lax.dynamic_slice_in_dim(head, begin, size, 0)
        ids = jax.lax.dynamic_slice_in_dim(columns.whole.ids, begin, size, 0)
        # The last part begins early, as the last chunk does.
        is_counted = (begin + jnp.arange(size) >= index * size) & (ids < options.num_valid)
        everywhere = (*axes.vocab, *axes.head_embed)
        total = jnp.where(is_counted[:, None], part, 0).astype(jnp.float32).sum(0)
        mean = psum(total, everywhere) / options.num_valid
        # Centred first where that is exact. Centred bfloat16 columns would be rounded, while their
        # uncentred squares are exact in float32; and what a large mean then costs is less than
        # bfloat16's own rounding of the logits.
        is_exact = part.dtype != jnp.bfloat16
        part = jnp.where(is_counted[:, None], part - mean if is_exact else part, 0)
        gram = jnp.einsum(
            "vD,vE->DE",
            part,
            part,
            precision=jax.lax.Precision.HIGHEST if is_exact else None,
            preferred_element_type=jnp.float32,
        )
        gram = psum(gram, everywhere) / options.num_valid
        return cls(mean, gram if is_exact else gram - mean[:, None] * mean)


class Rows(NamedTuple):
    """A shard's rows; with LN also the mean of their logits, the reciprocal of their deviation, and
    x G."""

    x: Float[Array, "n D"]
    mean: Float[Array, "n 1"] | float = 0.0
    rstd: Float[Array, "n 1"] | float = 1.0
    x_covariance: Float[Array, "n D"] | None = None

    @classmethod
    def of(cls, x: Float[Array, "n D"], statistics: Statistics | None, eps: float) -> "Rows":
        if statistics is None:
            return cls(x)
        x32 = x.astype(jnp.float32)
        x_covariance = _exact_matmul(x, statistics.covariance)
        # A sum of squares, but for rounding.
        variance = jnp.maximum((x_covariance * x32).sum(-1, keepdims=True), 0.0)
        mean = (x32 * statistics.mean).sum(-1, keepdims=True)
        return cls(x, mean, jax.lax.rsqrt(variance + eps), x_covariance)

    def logits(self, chunk: Chunk, letters: str) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
        """Returns the logits normalised, and after LN's gain and bias; without LN both are x W."""
        logits = jnp.einsum(
            f"nD,{letters}->nc", self.x, chunk.head, preferred_element_type=jnp.float32
        )
        if chunk.scale is None:
            return logits, logits
        normed = (logits - self.mean) * self.rstd
        return normed, normed * chunk.scale + chunk.bias


def _exact_matmul(x: Float[Array, "n D"], matrix: Float[Array, "D E"]) -> Float[Array, "n E"]:
    """Returns x times a float32 matrix to about float32's precision, also where x is bfloat16."""
    if x.dtype != jnp.bfloat16:
        return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)
    # In two bfloat16 halves, 16 bits together: a float32 matmul would be six passes, not two. Not
    # by casting there and back, which XLA may drop as needless: the second half would be zero.
    high = jax.lax.reduce_precision(matrix, exponent_bits=8, mantissa_bits=7)
    halves = (half.astype(x.dtype) for half in (high, matrix - high))
    return sum(jnp.matmul(x, half, preferred_element_type=jnp.float32) for half in halves)


def stored(x: Float[Array, "n c"], dtype: DTypeLike) -> Float[Array, "n c"]:
    """Returns x in the dtype, made before what uses it. Without the barrier the TPU's compiler
    makes it anew for every tile of each matmul that reads it, which took twice as long."""
    return jax.lax.optimization_barrier(x.astype(dtype))


def through_statistics(
    dx_nD: Float[Array, "n D"],
    dhead: Float[Array, "..."] | None,
    sum_n: Float[Array, "n"],
    sum_normed_n: Float[Array, "n"],
    rows: Rows,
    columns: Columns,
    statistics: Statistics,
    axes: Axes,
    options: Options,
) -> tuple[Float[Array, "n D"], Float[Array, "..."] | None]:
    """Returns the gradients of x and of W with what LN's mean and deviation add to them.

    The backward pass of LN takes off each logit the row's mean gradient, m1, and m2 times the
    normalised logit. Summed over the vocabulary these are, by mean w and covariance G,

        dx -= V rstd (m1 w + m2 rstd x G)
        dW -= u 1^T + H (W - w 1^T),  u = sum_n rstd m1 x,  H = sum_n rstd^2 m2 x x^T

    Args:
      sum_n: V m1.
      sum_normed_n: V m2.
    """
    dx_nD -= rows.rstd * (
        sum_n[:, None] * statistics.mean + sum_normed_n[:, None] * rows.rstd * rows.x_covariance
    )
    if dhead is None:
        return dx_nD, None
    x32 = rows.x.astype(jnp.float32)
    weighted_nD = x32 * rows.rstd / options.num_valid
    u_D = sum_scattered((weighted_nD * sum_n[:, None]).sum(0), axes)
    h_DD = jnp.einsum(
        "nD,nE->DE",
        (weighted_nD * rows.rstd * sum_normed_n[:, None]).astype(rows.x.dtype),
        rows.x,
        preferred_element_type=jnp.float32,
    )
    h_DD = sum_scattered(h_DD, axes)
    constant_D = u_D - h_DD @ statistics.mean
    correction_Dv = constant_D[:, None] + jnp.einsum(
        f"ED,{options.head_letters.replace('V', 'v')}->Ev",
        h_DD.astype(rows.x.dtype),
        columns.whole.head,
        preferred_element_type=jnp.float32,
    )
    is_valid_v = columns.whole.ids < options.num_valid
    correction_Dv = jnp.where(is_valid_v, correction_Dv, 0.0)
    return dx_nD, dhead - (correction_Dv.T if options.is_table else correction_Dv)
