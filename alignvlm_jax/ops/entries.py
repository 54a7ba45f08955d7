"""Entries of a sharded vocabulary that a row's outputs are of: its labels, whose logits are picked,
and the few that it keeps, which alone have weight in its average.

The k likeliest of all entries are the k likeliest among the k likeliest of each chunk and of each
shard. Their average takes k rows of the table, where that over all entries is a matmul over them.
Letters: `shapes.py`; n and v are a shard's rows and columns, c a chunk's columns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignvlm_jax.ops.vocab_shards import gather, psum
from alignvlm_jax.shapes import Array, Float, Int


def pick_labels(
    logits: Float[Array, "n c"], label_ids: Int[Array, "n k"], ids: Int[Array, "c"]
) -> Float[Array, "n k"]:
    """Returns the logits of labels that are among these columns, whose entries are `ids`; 0 of the
    others."""
    # One label at a time: for all k together, the mask would be [n, k, c].
    picked = [
        jnp.where(label_ids[:, j, None] == ids, logits, 0.0).sum(-1)
        for j in range(label_ids.shape[1])
    ]
    return jnp.stack(picked, axis=-1) if picked else jnp.zeros(label_ids.shape)


def linear_weights(
    logits: Float[Array, "n c"], num_entries: Float[Array, ""]
) -> Float[Array, "n c"]:
    """Returns linear weights: of any sign, 0 for masked logits, which are exactly -inf. A NaN is
    none of them: it should reach the loss."""
    return jnp.where(logits != -jnp.inf, logits, 0.0) / jnp.sqrt(num_entries)


def num_entries_of(mask: Float[Array, "v"], axes: tuple[str, ...]) -> Float[Array, ""]:
    """Returns the number of entries of the whole vocabulary that may have weight."""
    return psum((mask == 0).sum(), axes).astype(jnp.float32)


class Kept(NamedTuple):
    """The entries that each row keeps, of a few columns, of a shard or of all.

    Attributes:
      logits: -inf of what may have no weight.
      ids: which; -1 is no entry.
    """

    logits: Float[Array, "n kept"]
    ids: Int[Array, "n kept"]

    @classmethod
    def start(cls, num_rows: int, top_k: int, given: Int[Array, "n kept"] | None) -> "Kept":
        """Returns what a row keeps before the first column: of the `top_k` likeliest none yet, and
        of given entries no logit."""
        if given is not None:
            return cls(jnp.zeros(given.shape), given)
        return cls(jnp.full((num_rows, top_k), -jnp.inf), jnp.full((num_rows, top_k), -1))

    def with_columns(
        self, logits: Float[Array, "n c"], ids: Int[Array, "c"], is_given: bool
    ) -> "Kept":
        """Returns what a row keeps of these columns too, whose entries are `ids`."""
        if is_given:
            return self._replace(logits=self.logits + pick_labels(logits, self.ids, ids))
        count = self.ids.shape[1]
        largest, columns = jax.lax.top_k(logits, min(count, ids.size))
        # Of equal logits the entry that comes first is kept, as by top-k over all columns.
        return Kept(
            jnp.concatenate([self.logits, largest], axis=1),
            jnp.concatenate([self.ids, ids[columns]], axis=1),
        ).likeliest(count)

    def likeliest(self, count: int) -> "Kept":
        """Returns the `count` entries with the largest logits."""
        logits, columns = jax.lax.top_k(self.logits, count)
        return Kept(logits, jnp.take_along_axis(self.ids, columns, axis=1))

    def of_all_shards(
        self, axes: tuple[str, ...], is_given: bool, total: Float[Array, "n"]
    ) -> "Kept":
        """Returns what a row keeps of the whole vocabulary, which is sharded over these axes; NaN
        where its sum over all entries is, since a top-k may pass over a NaN, which should reach the
        loss."""
        if is_given:
            logits = jnp.where(self.ids < 0, -jnp.inf, psum(self.logits, axes))
            ids = self.ids
        else:
            kept = Kept(gather(self.logits, axes, 1), gather(self.ids, axes, 1))
            logits, ids = kept.likeliest(self.ids.shape[1])
            ids = jnp.where(logits == -jnp.inf, -1, ids)
        return Kept(jnp.where(jnp.isnan(total)[:, None], jnp.nan, logits), ids)

    def average(self, table: Float[Array, "v width"], first: Int[Array, ""]) -> Array:
        """Returns what a shard of the table adds to the averages, float32 [n, width]; the shard's
        first row is of the entry `first`."""

        def add(sums: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
            ids, weights = entry
            rows = _rows(table, _places(ids, first, table))
            return sums + weights[:, None] * rows, None

        # An entry at a time: [n, kept, width] may be larger than a chunk of logits.
        zeros = jnp.zeros((len(self.ids), table.shape[1]))
        return jax.lax.scan(add, zeros, (self.ids.T, self._weights().T))[0]

    def gradients(
        self,
        table: Float[Array, "v width"],
        first: Int[Array, ""],
        daverage: Float[Array, "n width"],
        axes: tuple[str, ...],
        wants_table: bool,
    ) -> tuple[Float[Array, "n kept"], Float[Array, "v width"] | None]:
        """Returns the gradients of the logits, and of the shard of the table by this shard's rows,
        if it is wanted, float32."""
        dout = daverage.astype(jnp.float32)

        def add(dtable: Array | None, entry: tuple[Array, Array]) -> tuple[Array | None, Array]:
            ids, weights = entry
            places = _places(ids, first, table)
            rows = _rows(table, places)
            if dtable is not None:
                dtable = dtable.at[places].add(weights[:, None] * dout, mode="drop")
            return dtable, (rows * dout).sum(-1)

        weights = self._weights()
        # Float32 whatever the table's dtype: a thousand rows may keep the same entry.
        zeros = jnp.zeros(table.shape) if wants_table else None
        dtable, dweights = jax.lax.scan(add, zeros, (self.ids.T, weights.T))
        dweights = psum(dweights.T, axes)
        # Of the softmax over what is kept: other entries have no part in it.
        return weights * (dweights - (weights * dweights).sum(-1, keepdims=True)), dtable

    def _weights(self) -> Float[Array, "n kept"]:
        return jax.nn.softmax(self.logits, axis=-1)


def _places(
    ids: Int[Array, "n"], first: Int[Array, ""], table: Float[Array, "v width"]
) -> Int[Array, "n"]:
    """Returns the rows of a shard that entries have; of those in other shards one beyond its
    last."""
    # A negative index would count from the end.
    places = ids - first
    return jnp.where((places >= 0) & (ids >= 0), places, len(table))


def _rows(table: Float[Array, "v width"], places: Int[Array, "n"]) -> Float[Array, "n width"]:
    """Returns rows of a shard in float32, zeros of places beyond its last."""
    return jnp.take(table, places, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
