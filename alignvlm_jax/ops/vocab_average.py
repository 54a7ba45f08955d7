"""The average of a table's rows over a vocabulary, weighted by a softmax (arXiv 2502.01341,
equation 1):

    z = LN(x W);  P = softmax_V(z);  average = P E

For the paper's model and one page, P alone takes 3.7 GB. The plain form computes all of P at once,
and lets the partitioner shard it; the chunked form holds some columns of P at a time
(`ops.chunked`). Letters: `shapes.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.ops import chunked, entries
from alignvlm_jax.ops.cross_entropy import project
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

    average: Float[Array, "N D"] | None
    label_logits: Float[Array, "N k"]
    log_sum_exp: Float[Array, "N"]


def vocab_logits(
    x: Float[Array, "N D"],
    head: Float[Array, "D V"],
    norm: Norm | None,
    unpadded_vocab_size: int | None = None,
) -> Float[Array, "N V"]:
    """Returns z in float32, with -inf at the columns from `unpadded_vocab_size` on, which only pad
    the table.

    Args:
      x: rows, whose width is that of W's first axis.
      head: W, a parameter.
      norm: LN over the vocabulary; None leaves it out.
      unpadded_vocab_size: None: no column is padding.
    """
    logits_NV = project("ND,DV->NV", x, head)
    logits_NV = nn.with_logical_constraint(logits_NV, ("act_batch", "act_vocab"))
    if norm is not None:
        # The mask comes after LN: of -inf, a gain of 0 would make NaN, a negative gain +inf.
        logits_NV = layer_norm(logits_NV, norm.scale, norm.bias, norm.eps, unpadded_vocab_size)
    if unpadded_vocab_size is None or unpadded_vocab_size == logits_NV.shape[-1]:
        return logits_NV
    return jnp.where(jnp.arange(logits_NV.shape[-1]) < unpadded_vocab_size, logits_NV, -jnp.inf)


def vocab_average(
    x: Float[Array, "N width"],
    head: Float[Array, "width V"],
    table: Float[Array, "V D"] | None,
    norm: Norm | None,
    *,
    label_ids: Int[Array, "N k"] | None = None,
    unpadded_vocab_size: int | None = None,
    subset: Bool[Array, "V"] | None = None,
    linear: bool = False,
    top_k: int = 0,
    kept_ids: Int[Array, "N kept"] | None = None,
    chunk: int | None = None,
) -> VocabAverage:
    """Returns the average of the table's rows for each row of x, in the dtype of x; sums and
    softmax are float32.

    Args:
      x: rows, whose width need not be the table's.
      head: W, a parameter.
      table: E, a parameter; None: no average is made.
      norm: LN over the vocabulary; None leaves it out.
      label_ids: tokens whose logits are returned, 0 of an id that is none; None: of none, k is 0.
      unpadded_vocab_size: the columns from here on only pad the table, and take no part in LN or
        softmax; None: there are none.
      subset: tokens that may have weight; the softmax is over them alone, LN over all.
      linear: the weights are z / sqrt(V) in the place of P, of any sign, so that the average lies
        in the table's linear span and not in its convex hull. LN gives z variance 1; scaled so,
        averages are about as long as the table's rows.
      top_k: the average is over the row's likeliest entries, so many, by the softmax over these
        alone; what is returned of its distribution stays over all. 0: all; not with `linear`.
      kept_ids: entries of each row that are kept in the place of the likeliest; -1 is none.
      chunk: columns of a shard at a time, see `chunked.columns_per_chunk`; None: the plain form.
    """
    vocab_size = head.shape[1]
    num_valid = vocab_size if unpadded_vocab_size is None else unpadded_vocab_size
    has_weight = jnp.arange(vocab_size) < num_valid
    if subset is not None:
        has_weight &= subset
    if label_ids is None:
        label_ids = jnp.zeros((x.shape[0], 0), jnp.int32)
    keeps_few = table is not None and (top_k > 0 or kept_ids is not None)
    if keeps_few and chunk is None:
        # All columns of a shard in one chunk: the partitioner would gather [N, V] for a top-k.
        chunk = vocab_size
    if chunk is None:
        return _plain(x, head, table, norm, label_ids, num_valid, has_weight, linear)
    scale, bias, eps = norm or (None, None, 0.0)
    outputs = chunked.vocab_softmax(
        chunked.Inputs(x, head, table, scale, bias),
        label_ids,
        has_weight,
        chunked.Options(chunk, num_valid, eps, linear, top_k=top_k),
        kept_ids,
    )
    average_ND = outputs.average
    if average_ND is not None:
        average_ND = nn.with_logical_constraint(average_ND, ("act_batch", "act_embed"))
    # A label that has no weight is infinitely unlikely, whatever its logit.
    is_left_out_Nk = (label_ids >= 0) & (label_ids < vocab_size) & ~has_weight[label_ids]
    label_logits_Nk = jnp.where(is_left_out_Nk, -jnp.inf, outputs.label_logits)
    return VocabAverage(average_ND, label_logits_Nk, outputs.log_sum_exp)


def _plain(
    x: Float[Array, "N width"],
    head: Float[Array, "width V"],
    table: Float[Array, "V D"] | None,
    norm: Norm | None,
    label_ids: Int[Array, "N k"],
    num_valid: int,
    has_weight: Bool[Array, "V"],
    linear: bool,
) -> VocabAverage:
    """Returns `vocab_average` of all columns at once."""
    logits_NV = vocab_logits(x, head, norm, num_valid)
    logits_NV = jnp.where(has_weight, logits_NV, -jnp.inf)
    log_sum_exp_N = jax.nn.logsumexp(logits_NV, axis=-1)
    ids_V = jnp.arange(logits_NV.shape[-1])
    label_logits_Nk = entries.pick_labels(logits_NV, label_ids, ids_V)
    if table is None:
        return VocabAverage(None, label_logits_Nk, log_sum_exp_N)
    if linear:
        num_entries = has_weight.sum().astype(jnp.float32)
        weights_NV = entries.linear_weights(logits_NV, num_entries)
    else:
        # The softmax, by the sum that the labels' cross-entropy needs anyway.
        weights_NV = jnp.exp(logits_NV - log_sum_exp_N[:, None])
    # The matmul has operands in the dtype of the computation, and sums in float32.
    average_ND = project("NV,VD->ND", weights_NV.astype(x.dtype), table).astype(x.dtype)
    average_ND = nn.with_logical_constraint(average_ND, ("act_batch", "act_embed"))
    return VocabAverage(average_ND, label_logits_Nk, log_sum_exp_N)
