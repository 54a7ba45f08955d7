"""The backward pass of the softmax over a vocabulary in chunks (`ops.chunked`, which has the
mathematics), on one device's shards."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignvlm_jax.ops.entries import Kept, linear_weights, num_entries_of
from alignvlm_jax.ops.vocab_shards import (
    Axes,
    Chunk,
    Columns,
    Inputs,
    Options,
    Outputs,
    Rows,
    Statistics,
    psum,
    scatter,
    stored,
    through_statistics,
    without,
)
from alignvlm_jax.shapes import Array, Float, Int


class Saved(NamedTuple):
    """What the backward pass finds beside the inputs."""

    average: Float[Array, "n out_width"] | None
    log_sum_exp: Float[Array, "n"]
    kept: Kept | None
    statistics: Statistics | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Of which inputs a gradient is wanted: a frozen parameter costs no matmul."""

    head: bool
    table: bool


class _Chunks(NamedTuple):
    """What every chunk's backward pass needs: a device's columns and rows, and what their logits
    get from the gradients of the outputs.

    Attributes:
      log_sum_exp: of the forward pass, from which a chunk's P is made again.
      daverage: of the average, None without one.
      slope: what a logit gets, times its P, beside what the average hands on: the gradient of the
        log of the sum, less sum_V P dP, which is the row's average times its gradient.
      label_ids, dlabel_logits: entries whose logits have gradients of their own.
    """

    options: Options
    axes: Axes
    wanted: Wanted
    num_entries: Int[Array, ""]
    columns: Columns
    rows: Rows
    log_sum_exp: Float[Array, "n"]
    daverage: Float[Array, "n out_width"] | None
    slope: Float[Array, "n"]
    label_ids: Int[Array, "n k"]
    dlabel_logits: Float[Array, "n k"]

    def chunk(self, carry: tuple, index: Int[Array, ""]) -> tuple[tuple, tuple]:
        """Adds a chunk's part to dx and to LN's two sums; returns the chunk's own gradients."""
        dx_nD, sum_n, sum_normed_n = carry
        letters = self.options.chunk_letters
        chunk = self.columns.take(index)
        normed_nc, unmasked_nc = self.rows.logits(chunk, letters)
        dlogits_nc, dtable_cd = self._dlogits(chunk, unmasked_nc + chunk.mask)
        dscale_c = None
        dbias_c = None
        if chunk.scale is not None:
            dscale_c = (dlogits_nc * normed_nc).sum(0)
            dbias_c = dlogits_nc.sum(0)
            dlogits_nc *= chunk.scale
            # What LN takes off is known when all chunks are done: these sums are kept for it.
            sum_n += dlogits_nc.sum(-1)
            sum_normed_n += (dlogits_nc * normed_nc).sum(-1)
            dlogits_nc *= self.rows.rstd
        dlogits_nc = stored(dlogits_nc, self.rows.x.dtype)
        dx_nD += self._matmul(f"nc,{letters}->nD", dlogits_nc, chunk.head)
        dhead = None
        if self.wanted.head:
            # Scattered at once, so that no device ever holds the gradient at W's full width.
            dhead = self._matmul(f"nD,nc->{letters}", self.rows.x, dlogits_nc)
            dhead = scatter(dhead, self.axes.head_embed, letters.index("D"))
        return (dx_nD, sum_n, sum_normed_n), (dhead, dtable_cd, dscale_c, dbias_c)

    def _dlogits(
        self, chunk: Chunk, logits_nc: Float[Array, "n c"]
    ) -> tuple[Float[Array, "n c"], Float[Array, "c d"] | None]:
        """Returns the gradients of a chunk's logits and of its rows of the table, if wanted."""
        weights_nc = jnp.exp(logits_nc - self.log_sum_exp[:, None])
        dlogits_nc = weights_nc * self.slope[:, None]
        dtable_cd = None
        if chunk.table is not None:
            dweights_nc = self._matmul("nD,cD->nc", self.daverage, chunk.table)
            dweights_nc = jax.lax.optimization_barrier(dweights_nc)
            if self.options.linear:
                weights_nc = linear_weights(logits_nc, self.num_entries)
                dweights_nc = jnp.where(chunk.mask == 0, dweights_nc, 0.0)
                dlogits_nc += dweights_nc / jnp.sqrt(self.num_entries)
            else:
                dlogits_nc += weights_nc * dweights_nc
            if self.wanted.table:
                stored_nc = stored(weights_nc, self.rows.x.dtype)
                dtable_cd = self._matmul("nc,nD->cD", stored_nc, self.daverage)
                dtable_cd = scatter(dtable_cd, self.axes.table_embed, 1)
        # One after another: of all k at once [n, c, k] would be k chunks of memory.
        for j in range(self.label_ids.shape[1]):
            is_label_nc = self.label_ids[:, j, None] == chunk.ids
            dlogits_nc += jnp.where(is_label_nc, self.dlabel_logits[:, j, None], 0.0)
        return dlogits_nc, dtable_cd

    def _matmul(self, equation: str, a: Array, b: Array) -> Float[Array, "..."]:
        # Both in the dtype of the computation: a float32 operand would leave the fast path.
        dtype = self.rows.x.dtype
        return jnp.einsum(
            equation, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
        )


def gradients(
    options: Options,
    axes: Axes,
    wanted: Wanted,
    inputs: Inputs,
    label_ids: Int[Array, "n k"],
    mask: Float[Array, "v"],
    saved: Saved,
    douts: Outputs,
) -> Inputs:
    """Returns the gradients of a device's shards of the inputs."""
    chunks, dtable = _chunks(options, axes, wanted, inputs, label_ids, mask, saved, douts)
    zeros_n = jnp.zeros(inputs.x.shape[0])
    carry = jnp.zeros(inputs.x.shape), zeros_n, zeros_n
    carry, parts = jax.lax.scan(chunks.chunk, carry, jnp.arange(chunks.columns.number))
    dx_nD, sum_n, sum_normed_n = (psum(x, axes.vocab) for x in carry)
    letters = options.head_letters
    dhead, dtable_parts, dscale, dbias = (
        None if part is None else chunks.columns.joined(part, axis)
        for part, axis in zip(parts, (letters.index("V"), 0, 0, 0), strict=True)
    )
    # Of what is kept the table's gradient is made at once, outside of the chunks.
    dtable = dtable_parts if dtable is None else dtable
    summed = Inputs(
        dx_nD,
        _summed(dhead, without(axes.rows, axes.head_embed)),
        _summed(dtable, without(axes.rows, axes.table_embed)),
        _summed(dscale, axes.rows),
        _summed(dbias, axes.rows),
    )
    if inputs.scale is not None:
        dx_nD, dhead = through_statistics(
            dx_nD,
            summed.head,
            sum_n,
            sum_normed_n,
            chunks.rows,
            chunks.columns,
            saved.statistics,
            axes,
            options,
        )
        summed = summed._replace(x=dx_nD, head=dhead)
    # Of what is frozen there is none, and custom_vjp wants zeros for it.
    return Inputs(
        *(
            None if x is None else jnp.zeros_like(x) if dx is None else dx.astype(x.dtype)
            for x, dx in zip(inputs, summed, strict=True)
        )
    )


def _chunks(
    options: Options,
    axes: Axes,
    wanted: Wanted,
    inputs: Inputs,
    label_ids: Int[Array, "n k"],
    mask: Float[Array, "v"],
    saved: Saved,
    douts: Outputs,
) -> tuple:
    """Returns the `_Chunks`; and where entries are kept, the gradient of the table's shard, if it
    is wanted, float32 [v, d], else None."""
    columns = Columns.of(inputs, mask, axes, options)
    dlabel_logits = douts.label_logits
    dtable = None
    if saved.kept is not None:
        columns, table = columns.without_table()
        dkept, dtable = saved.kept.gradients(
            table, columns.first, douts.average, axes.vocab, wanted.table
        )
        # To the logits of what is kept gradients come as to those of labels.
        label_ids = jnp.concatenate([label_ids, saved.kept.ids], axis=1)
        dlabel_logits = jnp.concatenate([dlabel_logits, dkept], axis=1)
        if dtable is not None:
            dtable = scatter(dtable, axes.table_embed, 1)
    slope_n = douts.log_sum_exp
    if columns.whole.table is not None and not options.linear:
        slope_n = slope_n - (
            douts.average.astype(jnp.float32) * saved.average.astype(jnp.float32)
        ).sum(-1)
    chunks = _Chunks(
        options,
        axes,
        wanted,
        num_entries_of(mask, axes.vocab),
        columns,
        Rows.of(inputs.x, saved.statistics, options.eps),
        saved.log_sum_exp,
        douts.average,
        slope_n,
        label_ids,
        dlabel_logits,
    )
    return chunks, dtable


def _summed(x: Array | None, axes: tuple[str, ...]) -> Array | None:
    return None if x is None else psum(x, axes)
