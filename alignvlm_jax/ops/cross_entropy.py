"""Cross-entropy over a vocabulary that may be sharded, or over a sample of it, and the matmul that
makes logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.ops import chunked, entries
from alignvlm_jax.shapes import Array, Bool, Float, Int


class TokenLosses(NamedTuple):
    """Losses of each token: -log P(target) in nats, the log of the sum that normalises P, and
    whether no other token is likelier than the target."""

    nll: Float[Array, "B T"]
    log_sum_exp: Float[Array, "B T"]
    is_correct: Bool[Array, "B T"]


# A custom derivative: differentiating through the cast of the matrix would round its gradient to
# the dtype of the computation on the way.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(
    equation: str, x: Float[Array, "..."], matrix: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns the einsum of x and the matrix, which is cast to the dtype of x; accumulated and
    returned in float32.

    Gradients are those of jnp.einsum, except that the matrix's is float32 where x is bfloat16.

    Args:
      equation: for example "ND,DV->NV".
      x: in the dtype of the computation.
      matrix: a parameter, of any dtype.
    """
    return jnp.einsum(equation, x, matrix.astype(x.dtype), preferred_element_type=jnp.float32)


def _project_forward(
    equation: str, x: Float[Array, "..."], matrix: Float[Array, "..."]
) -> tuple[Float[Array, "..."], tuple[Float[Array, "..."], Float[Array, "..."]]]:
    return project(equation, x, matrix), (x, matrix)


def _project_backward(
    equation: str, saved: tuple[Float[Array, "..."], Float[Array, "..."]], dout: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    x, matrix = saved
    operands, out = equation.split("->")
    rows, letters = operands.split(",")
    # Both operands in the dtype of the computation: a float32 one would take the whole matmul off
    # the matrix unit's fast path.
    dout = dout.astype(x.dtype)
    # Of "ND,DV->NV" these are "NV,DV->ND" and "ND,NV->DV".
    dx = jnp.einsum(
        f"{out},{letters}->{rows}",
        dout,
        matrix.astype(x.dtype),
        preferred_element_type=jnp.float32,
    )
    dmatrix = jnp.einsum(f"{rows},{out}->{letters}", x, dout, preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dmatrix.astype(matrix.dtype)


project.defvjp(_project_forward, _project_backward)


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
    head: Float[Array, "..."],
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
      head: the parameter [D, V], or with `is_table` the tied table [V, D].
      targets: token ids; an id that is no token has a finite loss, and should have no weight.
      is_table: whether `head` is the tied table.
      unpadded_vocab_size: the vocabulary entries from here on only pad the table, and are never
        predicted; None: there are none.
      chunk: columns of a shard at a time, see `chunked.columns_per_chunk`; None: all at once.
    """
    vocab_size = head.shape[0 if is_table else 1]
    num_valid = vocab_size if unpadded_vocab_size is None else unpadded_vocab_size
    has_weight = jnp.arange(vocab_size) < num_valid
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    targets_N = targets.reshape(-1)
    if chunk is not None:
        outputs = chunked.vocab_softmax(
            chunked.Inputs(hidden_ND, head),
            targets_N[:, None],
            has_weight,
            chunked.Options(chunk, num_valid, is_table=is_table),
        )
        picked_N = outputs.label_logits[:, 0]
        log_sum_exp_N = outputs.log_sum_exp
        largest_N = outputs.largest
    else:
        logits_NV = project("ND,VD->NV" if is_table else "ND,DV->NV", hidden_ND, head)
        logits_NV = nn.with_logical_constraint(logits_NV, ("act_batch", "act_vocab"))
        # Before the padding is masked: the id of image tokens may lie in it, and -inf times a
        # weight of 0 is NaN.
        picked_N = pick(logits_NV, targets_N)
        logits_NV = jnp.where(has_weight, logits_NV, -jnp.inf)
        log_sum_exp_N = jax.nn.logsumexp(logits_NV, axis=-1)
        # A maximum in the place of argmax: along a sharded vocabulary it is one small reduction.
        largest_N = logits_NV.max(-1)
    losses = log_sum_exp_N - picked_N, log_sum_exp_N, picked_N >= largest_N
    return TokenLosses(*(x.reshape(targets.shape) for x in losses))


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


class Sample(NamedTuple):
    """Some entries of a vocabulary, which stand for all of it.

    Attributes:
      ids: which.
      weights: how many entries each stands for: 1 of a label where all of them are there, and of
        the others as many as make up the vocabulary.
    """

    ids: Int[Array, "S"]
    weights: Float[Array, "S"]

    @classmethod
    def of_labels(
        cls, label_ids: Int[Array, "N k"], vocab_size: int, num_valid: int, size: int
    ) -> "Sample":
        """Returns the labels and, drawn without replacement, others of the first `num_valid`
        entries.

        The draw is a function of the labels, so that a step has no state of its own. Labels take at
        most half of the places, or nothing would stand for the rest of the vocabulary: of more,
        some are drawn, which stand for all of them.
        """
        ids_V = jnp.arange(vocab_size)
        is_label_V = jnp.zeros(vocab_size, bool).at[label_ids.reshape(-1)].set(True)
        draws_V = jax.random.uniform(jax.random.key(label_ids.sum()), (vocab_size,))
        is_valid_V = ids_V < num_valid
        # By their ids, rare tokens would be left out in every step.
        most = max(size // 2, 1)
        least = jax.lax.top_k(jnp.where(is_label_V, draws_V, -1.0), most)[0][-1]
        is_kept_V = is_label_V & (draws_V >= least)
        # Kept labels come first, then other entries, labels that find no place, and what pads the
        # table, which stands for nothing.
        rank_V = jnp.where(is_kept_V, 2.0, jnp.where(is_label_V, 0.0, 1.0))
        _, ids_S = jax.lax.top_k(jnp.where(is_valid_V, draws_V + rank_V, -1.0), size)
        is_label_S = is_label_V[ids_S]
        num_others = (~is_label_S & is_valid_V[ids_S]).sum()
        labels = is_label_V.sum() / jnp.maximum(is_label_S.sum(), 1)
        others = (num_valid - is_label_V.sum()) / jnp.maximum(num_others, 1)
        weights_S = jnp.where(is_label_S, labels, others)
        return cls(ids_S, jnp.where(is_valid_V[ids_S], weights_S, 0.0))


def sampled_cross_entropy(
    x: Float[Array, "N D"],
    head: Float[Array, "D V"],
    norm: tuple[Float[Array, "V"], Float[Array, "V"], float] | None,
    label_ids: Int[Array, "N k"],
    label_weights: Float[Array, "N k"],
    num_valid: int,
    size: int,
) -> Float[Array, "N"]:
    """Returns `soft_cross_entropy` of softmax(LN(x W)) as `size` entries of the vocabulary estimate
    it: LN's mean and variance, and the sum that normalises the softmax, are weighted sums over
    them. With all entries it is exact.

    Args:
      x: rows.
      head: W, a parameter.
      norm: gain, bias and epsilon of LN over the vocabulary; None leaves it out.
      label_ids: tokens that each row shows. All labels of all rows are among the entries; where
        they are more than half of `size`, a row with one that is left out has no loss, and those
        that have one count for it.
      label_weights: see `soft_cross_entropy`.
      num_valid: the columns from here on only pad the table.
      size: entries of the sample.
    """
    sample = Sample.of_labels(label_ids, head.shape[1], num_valid, size)
    logits_NS = project("ND,DS->NS", x, jnp.take(head, sample.ids, axis=1))
    if norm is not None:
        gain_V, bias_V, eps = norm
        fractions_S = sample.weights / num_valid
        centred_NS = logits_NS - (logits_NS * fractions_S).sum(-1, keepdims=True)
        variance_N1 = (jnp.square(centred_NS) * fractions_S).sum(-1, keepdims=True)
        logits_NS = centred_NS * jax.lax.rsqrt(variance_N1 + eps)
        logits_NS = logits_NS * gain_V[sample.ids] + bias_V[sample.ids]
    log_sum_exp_N = jax.nn.logsumexp(logits_NS, axis=-1, b=sample.weights)
    picked_Nk = entries.pick_labels(logits_NS, label_ids, sample.ids)
    nll_N = soft_cross_entropy(picked_Nk, log_sum_exp_N, label_weights)
    is_there_N = (jnp.isin(label_ids, sample.ids) | (label_weights == 0)).all(-1)
    # The mean of a batch is over all of its rows: left out at 0 they would make it look better.
    has_label_N = (label_weights > 0).any(-1)
    factor = has_label_N.sum() / jnp.maximum((has_label_N & is_there_N).sum(), 1)
    return jnp.where(is_there_N, factor * nll_N, 0.0)
