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

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec

from alignvlm_jax.ops.chunked_gradients import Saved, Wanted, gradients
from alignvlm_jax.ops.entries import Kept, linear_weights, num_entries_of, pick_labels
from alignvlm_jax.ops.vocab_shards import (
    Axes,
    Columns,
    Inputs,
    Options,
    Outputs,
    Rows,
    Statistics,
    num_shards,
    on_shards,
    psum,
    stored,
)
from alignvlm_jax.shapes import Array, Bool, Float, Int

# The running maximum before the first chunk. Not -inf: a chunk without any entry that may have
# weight would make NaN of -inf - -inf.
LOWEST = -1e30


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(options: Options, *arguments: Any) -> Outputs:
    return _run_forward(options, *arguments)[0]


def _softmax_forward(options: Options, inputs: Any, *others: Any) -> tuple:
    # With symbolic zeros each array comes with whether it is differentiated.
    wanted = Wanted(
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
    fn = functools.partial(gradients, options, axes, wanted)
    arguments, outputs = _specs(axes, options)
    run = on_shards(fn, (*arguments[:3], *reversed(outputs)), arguments[0])
    dinputs = run(inputs, label_ids, mask, saved, douts)
    return dinputs, None, None, None


_softmax.defvjp(_softmax_forward, _softmax_backward, symbolic_zeros=True)


def _run_forward(options: Options, *arguments: Any) -> tuple[Outputs, Saved]:
    inputs = arguments[0]
    axes = Axes.of(inputs, options)
    fn = functools.partial(_forward, options, axes)
    return on_shards(fn, *_specs(axes, options))(*arguments)


def _specs(axes: Axes, options: Options) -> tuple[tuple, tuple]:
    """Returns the specs of `_forward`'s arguments and of its outputs."""
    rows = PartitionSpec(axes.rows)
    arguments = axes.of_inputs(options), rows, PartitionSpec(axes.vocab), rows
    return arguments, (rows, Saved(rows, rows, rows, PartitionSpec()))


def _forward(
    options: Options,
    axes: Axes,
    inputs: Inputs,
    label_ids: Int[Array, "n k"],
    mask: Float[Array, "v"],
    kept_ids: Int[Array, "n kept"] | None,
) -> tuple[Outputs, Saved]:
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
        largest_n, total_n, sums_nD, picked_nk, kept = carry
        chunk = columns.take(index)
        _, unmasked_nc = rows.logits(chunk, options.chunk_letters)
        logits_nc = unmasked_nc + chunk.mask
        new_n = jnp.maximum(largest_n, logits_nc.max(-1))
        shrink_n = jnp.exp(largest_n - new_n)
        exponentials_nc = jnp.exp(logits_nc - new_n[:, None])
        total_n = total_n * shrink_n + exponentials_nc.sum(-1)
        if chunk.table is not None:
            weights_nc = exponentials_nc
            if options.linear:
                weights_nc = linear_weights(logits_nc, num_entries)
                shrink_n = jnp.ones_like(shrink_n)
            sums_nD = sums_nD * shrink_n[:, None] + jnp.einsum(
                "nc,cD->nD",
                stored(weights_nc, rows.x.dtype),
                chunk.table,
                preferred_element_type=jnp.float32,
            )
        picked_nk += pick_labels(unmasked_nc, label_ids, chunk.ids)
        if kept is not None:
            kept = kept.with_columns(logits_nc, chunk.ids, is_given)
        return (new_n, total_n, sums_nD, picked_nk, kept), None

    zeros_n = jnp.zeros(num_rows)
    summed = columns.whole.table
    sums_nD = None if summed is None else jnp.zeros((num_rows, summed.shape[1]))
    carry = zeros_n + LOWEST, zeros_n, sums_nD, jnp.zeros(label_ids.shape), kept
    carry, _ = jax.lax.scan(step, carry, jnp.arange(columns.number))
    largest_here_n, total_n, sums_nD, picked_nk, kept = carry

    # Each shard of the vocabulary has summed by its own maximum.
    largest_n = jax.lax.pmax(largest_here_n, axes.vocab) if axes.vocab else largest_here_n
    shrink_n = jnp.exp(largest_here_n - largest_n)
    total_n = psum(total_n * shrink_n, axes.vocab)
    log_sum_exp_n = largest_n + jnp.log(total_n)
    average_nD = None
    if sums_nD is not None:
        factor_n = jnp.ones_like(total_n) if options.linear else shrink_n / total_n
        average_nD = psum(sums_nD * factor_n[:, None], axes.vocab).astype(rows.x.dtype)
    if kept is not None:
        kept = kept.of_all_shards(axes.vocab, is_given, total_n)
        average_nD = psum(kept.average(table, columns.first), axes.vocab).astype(rows.x.dtype)
    outputs = Outputs(average_nD, psum(picked_nk, axes.vocab), log_sum_exp_n, largest_n)
    return outputs, Saved(average_nD, log_sum_exp_n, kept, statistics)
