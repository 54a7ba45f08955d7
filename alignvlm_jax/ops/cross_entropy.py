"""Cross-entropy over a vocabulary that may be sharded."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.ops import chunked
from alignvlm_jax.ops.chunked import Matrix
from alignvlm_jax.shapes import Array, Bool, Float, Int


class TokenLosses(NamedTuple):
    """Losses of each token: -log P(target) in nats, the log of the sum that normalises P, and
    whether no other token is likelier than the target."""

    nll: Float[Array, "B T"]
    log_sum_exp: Float[Array, "B T"]
    is_correct: Bool[Array, "B T"]


def pick(logits: Float[Array, "... V"], ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """Returns logits[..., ids], computed as a masked sum over the vocabulary.

    The sum stays where the logits are, and fuses with the other reductions over them; the cost of a
    gather along a sharded vocabulary would be up to the partitioner.
    """
    # An id that is no column matches none and picks 0: image tokens need no case of their own.
    vocabulary = jax.lax.broadcasted_iota(ids.dtype, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(vocabulary == ids[..., None], logits, 0.0), axis=-1)


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Matrix,
    targets: Int[Array, "B T"],
    *,
    is_table: bool,
    unpadded_vocab_size: int | None = None,
    chunk: int | None = None,
) -> TokenLosses:
    """Returns the losses of predicting `targets` from hidden states; with `chunk`, without logits
    [B, T, V].

    The caller weighs and sums the losses, and divides once, after adding up microbatches and hosts:
    a mean of means would weigh short answers more.

    Args:
      hidden: last hidden states.
      head: [D, V], or with `is_table` the tied table [V, D].
      targets: token ids; an id that is no token has a finite loss, and should have no weight.
      is_table: whether `head` is the tied table.
      unpadded_vocab_size: the vocabulary entries from here on only pad the table, and are never
        predicted; None: there are none.
      chunk: rows of a shard at a time, see `chunked.rows_per_chunk`; None: all at once.
    """
    equation = "ND,VD->NV" if is_table else "ND,DV->NV"

    def losses(
        rows: tuple[Float[Array, "N D"], Int[Array, "N"]], head: Matrix, row_axis: str | None
    ) -> tuple[Float[Array, "N"], Float[Array, "N"], Bool[Array, "N"]]:
        hidden_ND, targets_N = rows
        logits_NV = chunked.project(equation, hidden_ND, head)
        logits_NV = nn.with_logical_constraint(logits_NV, (row_axis, "act_vocab"))
        # Before the padding is masked: the id of image tokens may lie in it, and -inf times a
        # weight of 0 is NaN.
        picked_N = pick(logits_NV, targets_N)
        if unpadded_vocab_size is not None and unpadded_vocab_size < logits_NV.shape[-1]:
            logits_NV = jnp.where(
                jnp.arange(logits_NV.shape[-1]) < unpadded_vocab_size, logits_NV, -jnp.inf
            )
        log_sum_exp_N = jax.nn.logsumexp(logits_NV, axis=-1)
        # A maximum in the place of argmax: along a sharded vocabulary it is one small reduction.
        return log_sum_exp_N - picked_N, log_sum_exp_N, picked_N >= logits_NV.max(-1)

    # [B, T, D] to [B T, D]: chunks are cut from the tokens of all sequences together.
    rows = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    result = chunked.map_rows(losses, rows, head, chunk)
    return TokenLosses(*(x.reshape(targets.shape) for x in result))


def soft_cross_entropy(
    label_logits: Float[Array, "N k"],
    log_sum_exp: Float[Array, "N"],
    label_weights: Float[Array, "N k"],
) -> Float[Array, "N"]:
    """Returns -sum_k weight_k log P(label_k) of each patch, in nats: the loss of patch-token
    supervision.

    A label of weight 0 may have any logit, also the -inf of a token that is left out.
    """
    # The `where` comes before the multiplication, since -inf * 0 is NaN.
    weighted_Nk = jnp.where(label_weights > 0, label_logits, 0.0) * label_weights
    return log_sum_exp * label_weights.sum(-1) - weighted_Nk.sum(-1)
