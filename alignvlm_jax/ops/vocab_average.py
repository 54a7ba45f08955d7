"""The average of a table's rows over a vocabulary, weighted by a softmax (arXiv 2502.01341,
equation 1):

    z = LN(x W);  P = softmax_V(z);  average = P E

For the paper's model and one page, P alone takes 3.7 GB. The plain form computes all of P at once,
and lets the partitioner shard it; the chunked form holds a few hundred rows of P at a time
(`ops.chunked`). Letters: `shapes.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.ops import chunked
from alignvlm_jax.ops.chunked import Matrix
from alignvlm_jax.ops.cross_entropy import pick
from alignvlm_jax.ops.layer_norm import layer_norm
from alignvlm_jax.shapes import Array, Bool, Float, Int


class Norm(NamedTuple):
    """Parameters of LN, which runs over the vocabulary."""

    scale: Float[Array, "V"]
    bias: Float[Array, "V"]
    eps: float


class VocabAverage(NamedTuple):
    """The average for each row; and, of the row's distribution, the logits of its labels and the
    log of the sum that normalises it.

    A cross-entropy against the labels needs no more than these two, so P need not be kept.
    """

    average: Float[Array, "N D"]
    label_logits: Float[Array, "N k"]
    log_sum_exp: Float[Array, "N"]


def vocab_logits(
    x: Float[Array, "N D"],
    head: Matrix,
    norm: Norm | None,
    unpadded_vocab_size: int | None = None,
    row_axis: str | None = "act_batch",
) -> Float[Array, "N V"]:
    """Returns z in float32, with -inf at the columns from `unpadded_vocab_size` on, which only pad
    the table.

    Args:
      x: rows, whose width is that of W's first axis.
      head: W [D, V].
      norm: LN over the vocabulary; None leaves it out.
      unpadded_vocab_size: None: no column is padding.
      row_axis: logical axis of the rows; None inside a chunk.
    """
    logits_NV = chunked.project("ND,DV->NV", x, head)
    logits_NV = nn.with_logical_constraint(logits_NV, (row_axis, "act_vocab"))
    if norm is not None:
        # The mask comes after LN: of -inf, a gain of 0 would make NaN, a negative gain +inf.
        logits_NV = layer_norm(logits_NV, norm.scale, norm.bias, norm.eps, unpadded_vocab_size)
    if unpadded_vocab_size is None or unpadded_vocab_size == logits_NV.shape[-1]:
        return logits_NV
    return jnp.where(jnp.arange(logits_NV.shape[-1]) < unpadded_vocab_size, logits_NV, -jnp.inf)


def vocab_average(
    x: Float[Array, "N width"],
    head: Matrix,
    table: Matrix,
    norm: Norm | None,
    *,
    label_ids: Int[Array, "N k"] | None = None,
    unpadded_vocab_size: int | None = None,
    subset: Bool[Array, "V"] | None = None,
    linear: bool = False,
    chunk: int | None = None,
) -> VocabAverage:
    """Returns the average of the table's rows for each row of x, in the dtype of x; sums and
    softmax are float32.

    Args:
      x: rows, whose width need not be the table's.
      head: W [width, V].
      table: E [V, D].
      norm: LN over the vocabulary; None leaves it out.
      label_ids: tokens whose logits are returned; None: of none, k is 0.
      unpadded_vocab_size: the columns from here on only pad the table, and take no part in LN or
        softmax; None: there are none.
      subset: tokens that may have weight; the softmax is over them alone, LN over all.
      linear: the weights are z / sqrt(V) in the place of P, of any sign, so that the average lies
        in the table's linear span and not in its convex hull. LN gives z variance 1; scaled so,
        averages are about as long as the table's rows.
      chunk: rows of a shard at a time, see `chunked.rows_per_chunk`; None: the plain form.
    """
    # `shared` is a tree of arrays: eps, a number, stays out of it and comes in by closure.
    shared = {
        "head": head,
        "table": table,
        "norm": norm and (norm.scale, norm.bias),
        "subset": subset,
    }

    def average(rows: tuple, shared: dict, row_axis: str | None) -> VocabAverage:
        x, label_ids = rows
        norm_here = shared["norm"] and Norm(*shared["norm"], norm.eps)
        logits_NV = vocab_logits(x, shared["head"], norm_here, unpadded_vocab_size, row_axis)
        if shared["subset"] is not None:
            logits_NV = jnp.where(shared["subset"], logits_NV, -jnp.inf)
        log_sum_exp_N = jax.nn.logsumexp(logits_NV, axis=-1)
        if linear:
            # Masked entries are exactly -inf. A NaN is none of them: it should reach the loss.
            is_entry_NV = logits_NV != -jnp.inf
            weights_NV = jnp.where(is_entry_NV, logits_NV, 0.0) / jnp.sqrt(
                is_entry_NV.sum(-1, keepdims=True)
            )
        else:
            # The softmax, by the sum that the labels' cross-entropy needs anyway.
            weights_NV = jnp.exp(logits_NV - log_sum_exp_N[:, None])
        # The matmul has operands in the dtype of the computation, and sums in float32.
        average_ND = chunked.project(
            "NV,VD->ND", weights_NV.astype(x.dtype), shared["table"]
        ).astype(x.dtype)
        average_ND = nn.with_logical_constraint(average_ND, (row_axis, "act_embed"))
        # One label at a time: for all k together, the mask in `pick` would be [N, k, V].
        picked = [pick(logits_NV, label_ids[:, j]) for j in range(label_ids.shape[1])]
        label_logits_Nk = (
            jnp.stack(picked, axis=-1) if picked else jnp.zeros((x.shape[0], 0), jnp.float32)
        )
        return VocabAverage(average_ND, label_logits_Nk, log_sum_exp_N)

    # `map_rows` takes arrays alone: no labels are k = 0 labels.
    if label_ids is None:
        label_ids = jnp.zeros((x.shape[0], 0), jnp.int32)
    return chunked.map_rows(average, (x, label_ids), shared, chunk)
