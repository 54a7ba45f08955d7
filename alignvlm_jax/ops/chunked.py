"""The softmax over a vocabulary, and the average of a table's rows that it weighs, of which no
device ever holds more than a chunk of columns:

    z = LN(x W);  P = softmax_V(z);  average = P E

The vocabulary is the outer loop and all rows of a shard the inner one. So a chunk of W and of E is
read once, the gradient of a chunk is complete when it is made, and no device holds a float32
[V, D]: it is scattered over the shards of `embed` at once. Nothing in this order needs a pass over
the vocabulary of its own:

- The softmax is summed online (arXiv 1805.02867): a running maximum, and what was summed before
  shrinks when it grows. The backward pass has P of a chunk from the saved log of the sum.
- LN's mean over V is x w, of W's mean column w, and its variance x G x, of the covariance G [D, D]
  of W's columns. Its backward pass takes off a row's two means of gradients, which are known when
  all chunks are done: in dx by w and x G, in dW by sums over the rows, u [D] and H [D, D].

What a device holds, and what it gathers and scatters: `ops.vocab_shards`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from alignvlm_jax.ops.entries import Kept, linear_weights, num_entries_of, pick_labels
from alignvlm_jax.ops.vocab_shards import (
    Axes,
    Columns,
    Inputs,
    Options,
    Rows,
    Statistics,
    num_shards,
    on_shards,
    psum,
    scatter,
    through_statistics,
    without,
)
from alignvlm_jax.shapes import Array, Bool, Float, Int

# The running maximum before the first chunk. Not -inf: a chunk without any entry that may have
# weight would make NaN of -inf - -inf.
LOWEST = -1e30


class Outputs(NamedTuple):
    """Of each row: the average, in the dtype of x; the logits of its labels; the log of the sum
    that normalises P; and the largest logit of an entry that may have weight, which hands no
    gradient on."""

    average: Float[Array, "n out_width"] | None
    label_logits: Float[Array, "n k"]
    log_sum_exp: Float[Array, "n"]
    largest: Float[Array, "n"]


def columns_per_chunk(
    impl: str, chunk_size_mib: float, num_rows: int, num_columns: int
) -> int | None:
    """Returns the columns of a shard that a chunk holds, of at most `chunk_size_mib` MiB of float32
    for all rows of the shard; None stands for the plain form, all columns at once.

    Args:
      impl: "plain", "chunked", or "auto": chunked where a shard has more columns than a chunk.
      chunk_size_mib: MiB of one chunk on one device.
      num_rows: rows of all shards together.
      num_columns: columns of all shards of `act_vocab` together.
    """
    if impl == "plain":
        return None
    rows = math.ceil(num_rows / num_shards("act_batch"))
    columns = math.ceil(num_columns / num_shards("act_vocab"))
    fits = max(int(chunk_size_mib * 2**20 / (4 * rows)), 1)
    if columns <= fits:
        return None if impl == "auto" else columns
    # Multiples of 128 fill the registers' lanes. With 64 MiB, 7,290 rows leave 2,301 columns, of
    # which a chunk takes 2,176: as many chunks, and the last one is not narrow.
    step = 128 if fits > 128 else 1
    even = math.ceil(columns / math.ceil(columns / (fits - fits % step)))
    return min(math.ceil(even / step) * step, fits)


def vocab_softmax(
    inputs: Inputs,
    label_ids: Int[Array, "n k"],
    has_weight: Bool[Array, "v"],
    options: Options,
    kept_ids: Int[Array, "n kept"] | None = None,
) -> Outputs:
    """Returns the softmax's outputs for each row, in chunks of columns, on the mesh entered.

    Args:
      inputs: rows and parameters; gradients go to all of them.
      label_ids: entries whose logits are returned, whether they may have weight or not; of an id
        that is no entry it is 0.
      has_weight: entries that may have weight; the softmax is over them alone.
      options: see there.
      kept_ids: entries that alone have weight in a row's average, in the place of the likeliest; -1
        is none.
    """
    num_rows = inputs.x.shape[0]
    # Rows of zeros fill up the shards. What becomes of them is cut off, so no gradient comes back.
    filled = -num_rows % num_shards("act_batch")
    x, label_ids, kept_ids = jax.tree.map(
        lambda array: jnp.pad(array, ((0, filled), (0, 0))), (inputs.x, label_ids, kept_ids)
    )
    mask = jnp.where(has_weight, 0.0, -jnp.inf)
    outputs = _softmax(options, inputs._replace(x=x), label_ids, mask, kept_ids)
    return jax.tree.map(lambda row: row[:num_rows], outputs)


class _Saved(NamedTuple):
    """What the backward pass finds beside the inputs."""

    average: Float[Array, "n out_width"] | None
    log_sum_exp: Float[Array, "n"]
    kept: Kept | None
    statistics: Statistics | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Of which inputs a gradient is wanted: a frozen parameter costs no matmul."""

    head: bool
    table: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(options: Options, *arguments: Any) -> Outputs:
    return _run_forward(options, *arguments)[0]


def _softmax_forward(options: Options, inputs: Any, *others: Any) -> tuple:
    # With symbolic zeros each array comes with whether it is differentiated.
    wanted = _Wanted(
        head=inputs.head.perturbed, table=inputs.table is not None and inputs.table.perturbed
    )
    arguments = jax.tree.map(
        lambda primal: primal.value,
        (inputs, *others),
        is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal),
    )
    outputs, saved = _run_forward(options, *arguments)
    return outputs, (*arguments[:3], saved, wanted)


def _softmax_backward(options: Options, residuals: tuple, douts: Any) -> tuple:
    inputs, label_ids, mask, saved, wanted = residuals
    axes = Axes.of(inputs, options)
    # An output that nobody used comes as a zero without an array.
    douts = jax.tree.map(
        lambda dout: (
            jnp.zeros(dout.aval.shape, dout.aval.dtype) if isinstance(dout, SymbolicZero) else dout
        ),
        douts,
        is_leaf=lambda leaf: isinstance(leaf, SymbolicZero),
    )
    fn = functools.partial(_backward, options, axes, wanted)
    arguments, outputs = _specs(axes, options)
    run = on_shards(fn, (*arguments[:3], *reversed(outputs)), arguments[0])
    dinputs = run(inputs, label_ids, mask, saved, douts)
    return dinputs, None, None, None


_softmax.defvjp(_softmax_forward, _softmax_backward, symbolic_zeros=True)


def _run_forward(options: Options, *arguments: Any) -> tuple[Outputs, _Saved]:
    inputs = arguments[0]
    axes = Axes.of(inputs, options)
    fn = functools.partial(_forward, options, axes)
    return on_shards(fn, *_specs(axes, options))(*arguments)


def _specs(axes: Axes, options: Options) -> tuple[tuple, tuple]:
    """Returns the specs of `_forward`'s arguments and of its outputs."""
    rows = PartitionSpec(axes.rows)
    arguments = axes.of_inputs(options), rows, PartitionSpec(axes.vocab), rows
    return arguments, (rows, _Saved(rows, rows, rows, PartitionSpec()))


def _forward(
    options: Options,
    axes: Axes,
    inputs: Inputs,
    label_ids: Int[Array, "n k"],
    mask: Float[Array, "v"],
    kept_ids: Int[Array, "n kept"] | None,
) -> tuple[Outputs, _Saved]:
    """Returns the outputs of a device's rows, and what its backward pass needs."""
    columns = Columns.of(inputs, mask, axes, options)
    is_given = kept_ids is not None
    kept = None
    if inputs.table is not None and (options.top_k or is_given):
        kept = Kept.start(len(inputs.x), options.top_k, kept_ids)
        columns, table = columns.without_table()
    statistics = None if inputs.scale is None else Statistics.of(columns, axes, options)
    rows = Rows.of(inputs.x, statistics, options.eps)
    num_rows = inputs.x.shape[0]
    num_entries = num_entries_of(mask, axes.vocab)

    def step(carry: tuple, index: Int[Array, ""]) -> tuple[tuple, None]:
        largest_N, total_N, sums_ND, picked_Nk, kept = carry
        chunk = columns.take(index)
        _, unmasked_Nc = rows.logits(chunk, options.head_letters)
        logits_Nc = unmasked_Nc + chunk.mask
        new_N = jnp.maximum(largest_N, logits_Nc.max(-1))
        shrink_N = jnp.exp(largest_N - new_N)
        exponentials_Nc = jnp.exp(logits_Nc - new_N[:, None])
        total_N = total_N * shrink_N + exponentials_Nc.sum(-1)
        if chunk.table is not None:
            weights_Nc = exponentials_Nc
            if options.linear:
                weights_Nc = linear_weights(logits_Nc, num_entries)
                shrink_N = jnp.ones_like(shrink_N)
            sums_ND = sums_ND * shrink_N[:, None] + jnp.einsum(
                "NV,VD->ND",
                _stored(weights_Nc, rows.x.dtype),
                chunk.table,
                preferred_element_type=jnp.float32,
            )
        picked_Nk += pick_labels(unmasked_Nc, label_ids, chunk.ids)
        if kept is not None:
            kept = kept.with_columns(logits_Nc, chunk.ids, is_given)
        return (new_N, total_N, sums_ND, picked_Nk, kept), None

    zeros_N = jnp.zeros(num_rows)
    summed = columns.whole.table
    sums_ND = None if summed is None else jnp.zeros((num_rows, summed.shape[1]))
    carry = zeros_N + LOWEST, zeros_N, sums_ND, jnp.zeros(label_ids.shape), kept
    carry, _ = jax.lax.scan(step, carry, jnp.arange(columns.number))
    largest_here_N, total_N, sums_ND, picked_Nk, kept = carry

    # Each shard of the vocabulary has summed by its own maximum.
    largest_N = jax.lax.pmax(largest_here_N, axes.vocab) if axes.vocab else largest_here_N
    shrink_N = jnp.exp(largest_here_N - largest_N)
    total_N = psum(total_N * shrink_N, axes.vocab)
    log_sum_exp_N = largest_N + jnp.log(total_N)
    average_ND = None
    if sums_ND is not None:
        factor_N = jnp.ones_like(total_N) if options.linear else shrink_N / total_N
        average_ND = psum(sums_ND * factor_N[:, None], axes.vocab).astype(rows.x.dtype)
    if kept is not None:
        kept = kept.of_all_shards(axes.vocab, is_given, total_N)
        average_ND = psum(kept.average(table, columns.first), axes.vocab).astype(rows.x.dtype)
    outputs = Outputs(average_ND, psum(picked_Nk, axes.vocab), log_sum_exp_N, largest_N)
    return outputs, _Saved(average_ND, log_sum_exp_N, kept, statistics)


def _backward(
    options: Options,
    axes: Axes,
    wanted: _Wanted,
    inputs: Inputs,
    label_ids: Int[Array, "n k"],
    mask: Float[Array, "v"],
    saved: _Saved,
    douts: Outputs,
) -> Inputs:
    """Returns the gradients of a device's shards of the inputs."""
    columns = Columns.of(inputs, mask, axes, options)
    rows = Rows.of(inputs.x, saved.statistics, options.eps)
    dtype = inputs.x.dtype
    letters = options.head_letters
    num_entries = num_entries_of(mask, axes.vocab)
    dlabel_logits_Nk = douts.label_logits
    dtable = None
    if saved.kept is not None:
        columns, table = columns.without_table()
        dkept, dtable = saved.kept.gradients(
            table, columns.first, douts.average, axes.vocab, wanted.table
        )
        # To the logits of what is kept gradients come as to those of labels.
        label_ids = jnp.concatenate([label_ids, saved.kept.ids], axis=1)
        dlabel_logits_Nk = jnp.concatenate([dlabel_logits_Nk, dkept], axis=1)
    # The softmax's own backward pass needs sum_V P dP, which is the row's average times dout.
    slope_N = douts.log_sum_exp
    if columns.whole.table is not None and not options.linear:
        slope_N = slope_N - (
            douts.average.astype(jnp.float32) * saved.average.astype(jnp.float32)
        ).sum(-1)

    def matmul(equation: str, a: Array, b: Array) -> Array:
        # Both in the dtype of the computation: a float32 operand would leave the fast path.
        return jnp.einsum(
            equation, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
        )

    def step(carry: tuple, index: Int[Array, ""]) -> tuple[tuple, tuple]:
        dx_ND, sum_N, sum_normed_N = carry
        chunk = columns.take(index)
        normed_Nc, unmasked_Nc = rows.logits(chunk, letters)
        logits_Nc = unmasked_Nc + chunk.mask
        weights_Nc = jnp.exp(logits_Nc - saved.log_sum_exp[:, None])
        dlogits_Nc = weights_Nc * slope_N[:, None]
        dtable = None
        if chunk.table is not None:
            dweights_Nc = matmul("ND,VD->NV", douts.average, chunk.table)
            dweights_Nc = jax.lax.optimization_barrier(dweights_Nc)
            if options.linear:
                weights_Nc = linear_weights(logits_Nc, num_entries)
                has_weight_c = chunk.mask == 0
                dlogits_Nc += jnp.where(has_weight_c, dweights_Nc, 0.0) / jnp.sqrt(num_entries)
            else:
                dlogits_Nc += weights_Nc * dweights_Nc
            if wanted.table:
                dtable = matmul("NV,ND->VD", _stored(weights_Nc, dtype), douts.average)
                dtable = scatter(dtable, axes.table_embed, 1)
        for j in range(label_ids.shape[1]):
            is_label_Nc = label_ids[:, j, None] == chunk.ids
            dlogits_Nc += jnp.where(is_label_Nc, dlabel_logits_Nk[:, j, None], 0.0)

        dscale = None
        dbias = None
        if chunk.scale is not None:
            dscale = (dlogits_Nc * normed_Nc).sum(0)
            dbias = dlogits_Nc.sum(0)
            dlogits_Nc *= chunk.scale
            sum_N += dlogits_Nc.sum(-1)
            sum_normed_N += (dlogits_Nc * normed_Nc).sum(-1)
            dlogits_Nc *= rows.rstd
        dlogits_Nc = _stored(dlogits_Nc, dtype)
        dx_ND += matmul(f"NV,{letters}->ND", dlogits_Nc, chunk.head)
        dhead = None
        if wanted.head:
            dhead = matmul(f"ND,NV->{letters}", rows.x, dlogits_Nc)
            dhead = scatter(dhead, axes.head_embed, letters.index("D"))
        return (dx_ND, sum_N, sum_normed_N), (dhead, dtable, dscale, dbias)

    zeros_N = jnp.zeros(inputs.x.shape[0])
    carry = jnp.zeros(inputs.x.shape), zeros_N, zeros_N
    carry, parts = jax.lax.scan(step, carry, jnp.arange(columns.number))
    dx_ND, sum_N, sum_normed_N = (psum(x, axes.vocab) for x in carry)
    dhead, dtable_parts, dscale, dbias = parts
    if dhead is not None:
        dhead = psum(columns.joined(dhead, letters.index("V")), without(axes.rows, axes.head_embed))
    if saved.kept is not None and dtable is not None:
        dtable = scatter(dtable, axes.table_embed, 1)
    elif dtable_parts is not None:
        dtable = columns.joined(dtable_parts, 0)
    if dtable is not None:
        dtable = psum(dtable, without(axes.rows, axes.table_embed))
    if inputs.scale is not None:
        dscale, dbias = (psum(columns.joined(x, 0), axes.rows) for x in (dscale, dbias))
        dx_ND, dhead = through_statistics(
            dx_ND, dhead, sum_N, sum_normed_N, rows, columns, saved.statistics, axes, options
        )
    gradients = Inputs(dx_ND, dhead, dtable, dscale, dbias)
    # Of what is frozen there is none, and custom_vjp wants zeros for it.
    return Inputs(
        *(
            None if x is None else jnp.zeros_like(x) if dx is None else dx.astype(x.dtype)
            for x, dx in zip(inputs, gradients, strict=True)
        )
    )


def _stored(x: Float[Array, "n c"], dtype: DTypeLike) -> Float[Array, "n c"]:
    """Returns x in the dtype, made before what uses it. Without the barrier the TPU's compiler
    makes it anew for every tile of each matmul that reads it, which took twice as long."""
    return jax.lax.optimization_barrier(x.astype(dtype))
