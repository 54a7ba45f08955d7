"""Answers in the midst of generation, and the steps that they are made in: what `Sampler`
compiles."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignvlm_jax.inference import decoding
from alignvlm_jax.models.decoder import CACHE_AXES, Cache, Llama
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Bool, Float, Int


class Answering(NamedTuple):
    """Answers of a batch of prompts in the midst of generation; no row depends on another.

    S = T + num_new slots of the cache: those of the prompts, then a ring for new tokens. All rows
    write at the same slot of the ring, whenever they began: an answer has no more tokens than the
    ring has slots, so that none is overwritten before its row has ended.

    Attributes:
      step_B: how many tokens each answer has.
      token_B: the newest of each, not yet read.
      finished_B: which rows have nothing to do: their answers have ended, or are of full length.
      tokens_BT: the answers so far, [B, num_new], with padding after.
      cache: keys and values of what was read.
      prompt_lengths_B: the tokens of each prompt.
      decoding: the arrays `decoding.DTYPES`, or none.
      seen_BV: the tokens of each prompt and answer; None without `decoding`.
    """

    step_B: Int[Array, "B"]
    token_B: Int[Array, "B"]
    finished_B: Bool[Array, "B"]
    tokens_BT: Int[Array, "B T"]
    cache: Cache
    prompt_lengths_B: Int[Array, "B"]
    decoding: dict[str, Array]
    seen_BV: Bool[Array, "B V"] | None

    @property
    def ring_start(self) -> int:
        """The slot of the cache after those of prompts."""
        return self.cache.keys.shape[-1] - self.tokens_BT.shape[1]

    def mask(self) -> Bool[Array, "B S"]:
        """Returns the slots that the newest tokens may see, their own included."""
        size = self.tokens_BT.shape[1]
        slots_S = jnp.arange(self.cache.keys.shape[-1])
        # How many steps ago a slot of the ring was written, never negative by this %. What is older
        # than an answer belongs to another.
        ages_S = (self.cache.index - slots_S) % size
        is_new_BS = (slots_S >= self.ring_start) & (ages_S < self.step_B[:, None])
        return (slots_S < self.prompt_lengths_B[:, None]) | is_new_BS

    def with_next(
        self, logits_BV: Float[Array, "B V"], end_ids: tuple[int, ...], pad_id: int
    ) -> "Answering":
        """Returns the answers with one token more, those that are finished as they are."""
        is_working_B = ~self.finished_B
        if self.seen_BV is None:
            token_B = logits_BV.argmax(-1).astype(jnp.int32)
            seen_BV = None
        else:
            token_B = decoding.choose(logits_BV, self.seen_BV, self.decoding, self.step_B)
            seen_BV = self.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        token_B = jnp.where(is_working_B, token_B, pad_id)
        num_new = self.tokens_BT.shape[1]
        # Each row is at a place of its own. XLA on CPU scatters to one row after another; this is a
        # single loop.
        is_place_BT = jnp.arange(num_new) == self.step_B[:, None]
        is_place_BT &= is_working_B[:, None]
        step_B = self.step_B + is_working_B
        has_ended_B = jnp.isin(token_B, jnp.array(end_ids)) | (step_B == num_new)
        return self._replace(
            step_B=step_B,
            token_B=token_B,
            finished_B=self.finished_B | has_ended_B,
            tokens_BT=jnp.where(is_place_BT, token_B[:, None], self.tokens_BT),
            seen_BV=seen_BV,
        )


def idle(
    model: VLM, size: int, length: int, num_new: int, is_greedy: bool, *, pad_id: int
) -> Answering:
    """Returns rows that have nothing to do, see `Sampler.idle`."""
    zeros = jnp.zeros(size, jnp.int32)
    llm = model.config.llm
    decoder = Llama(llm, jnp.dtype(model.config.dtype), "none")
    cache = decoder.empty_cache(size, length + num_new)
    return Answering(
        step_B=zeros,
        token_B=jnp.full(size, pad_id, jnp.int32),
        finished_B=jnp.ones(size, bool),
        # A loop's carry keeps its shape, so that room for all tokens is there from the start.
        tokens_BT=jnp.full((size, num_new), pad_id, jnp.int32),
        cache=cache._replace(index=jnp.int32(length)),
        prompt_lengths_B=zeros,
        decoding={}
        if is_greedy
        else {name: jnp.zeros(size, dtype) for name, dtype in decoding.DTYPES.items()},
        seen_BV=None if is_greedy else jnp.zeros((size, llm.vocab_size), bool),
    )


def begin(
    model: VLM,
    variables: Mapping,
    batch: Mapping[str, Array],
    *,
    num_new: int,
    end_ids: tuple[int, ...],
    pad_id: int,
    room: int | None = None,
) -> Answering:
    """Returns the first token of each answer; the cache has `room` for others, by default for
    all."""
    is_prompt_BT = batch["segment_ids"] > 0
    size = len(is_prompt_BT)
    fields = {name: batch[name] for name in decoding.DTYPES if name in batch}
    seen_BV = None
    if fields:
        vocab_size = model.config.llm.vocab_size
        seen_BV = decoding.tokens_of_prompts(batch["tokens"], is_prompt_BT, vocab_size)
    # The only call with images: after it the cache is all that is known of them.
    room = num_new if room is None else room
    logits_BV, cache = model.apply(variables, batch, room, method="prefill")
    answering = Answering(
        step_B=jnp.zeros(size, jnp.int32),
        token_B=jnp.full(size, pad_id, jnp.int32),
        finished_B=jnp.zeros(size, bool),
        # A loop's carry keeps its shape, so that room for all tokens is there from the start.
        tokens_BT=jnp.full((size, num_new), pad_id, jnp.int32),
        cache=cache,
        prompt_lengths_B=is_prompt_BT.sum(-1, dtype=jnp.int32),
        decoding=fields,
        seen_BV=seen_BV,
    )
    return answering.with_next(logits_BV, end_ids, pad_id)


def insert(
    model: VLM,
    mesh: Mesh,
    variables: Mapping,
    answering: Answering,
    batch: Mapping[str, Array],
    rows: Int[Array, "new"],
    *,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Answering:
    """Returns the answers with those of other prompts in some rows, see `Sampler.insert`."""
    num_new = answering.tokens_BT.shape[1]
    ends = {"end_ids": end_ids, "pad_id": pad_id}
    # Without room for new tokens: these go to the ring of the batch that it is put into.
    new = begin(model, variables, batch, num_new=num_new, room=0, **ends)
    length = new.cache.keys.shape[-1]
    size = len(answering.step_B)
    num_shards = mesh_lib.data_parallel_size(mesh)
    first = jnp.arange(len(rows)) // (len(rows) // num_shards) * (size // num_shards)
    # Of a device's own rows. What goes nowhere lies beyond them all, also where the first is not 0.
    local_rows = jnp.where(rows < size, rows - first, size)

    def put(
        old: Float[Array, "L B K h S"], new: Float[Array, "L new K h T"], places: Int[Array, "new"]
    ) -> Float[Array, "L B K h S"]:
        return old.at[:, places, :, :, :length].set(new, mode="drop")

    # By device: rows stay where they are computed. XLA's partitioner would gather the cache first.
    axes = sharding.of_axes(CACHE_AXES, mesh).spec
    rows_spec = sharding.batch_sharding(mesh).spec
    put_local = jax.shard_map(put, in_specs=(axes, axes, rows_spec), out_specs=axes)
    cache = answering.cache._replace(
        keys=put_local(answering.cache.keys, new.cache.keys, local_rows),
        values=put_local(answering.cache.values, new.cache.values, local_rows),
    )
    return jax.tree.map(
        lambda old, new: old.at[rows].set(new, mode="drop"),
        answering._replace(cache=None),
        new._replace(cache=None),
    )._replace(cache=cache)


def advance(
    model: VLM,
    variables: Mapping,
    answering: Answering,
    num_steps: Int[Array, ""] | int,
    num_working: Int[Array, ""] | int = 0,
    *,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Answering:
    """Returns the answers with more tokens, see `Sampler.advance`."""

    def goes_on(carry: tuple[Int[Array, ""], Answering]) -> Bool[Array, ""]:
        # Decided on the devices: a loop in Python would wait for a token's transfer at every step.
        step, answering = carry
        count = (~answering.finished_B).sum()
        return (step < num_steps) & (count > num_working)

    def read(carry: tuple[Int[Array, ""], Answering]) -> tuple[Int[Array, ""], Answering]:
        """Reads the token of the step before and chooses this one: the last token of an answer is
        never read."""
        step, answering = carry
        # Finished rows are computed as well, since shapes are static. Nobody reads what they yield,
        # and a row that takes their place sees no slot that was written before it.
        # New tokens stand in the ring, but are counted from the end of their own prompt.
        logits_BV, cache = model.apply(
            variables,
            answering.token_B,
            answering.prompt_lengths_B + answering.step_B - 1,
            answering.mask(),
            answering.cache,
            method="decode",
        )
        start = answering.ring_start
        index = start + (cache.index - start) % answering.tokens_BT.shape[1]
        answering = answering._replace(cache=cache._replace(index=index))
        return step + 1, answering.with_next(logits_BV, end_ids, pad_id)

    _, answering = jax.lax.while_loop(goes_on, read, (jnp.int32(0), answering))
    return answering


def generate(
    model: VLM,
    variables: Mapping,
    batch: Mapping[str, Array],
    *,
    num_new: int,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B {num_new}"]:
    """Returns whole answers, see `Sampler.generate`."""
    # One program of both: nothing goes back to the host between prefill and the first token.
    ends = {"end_ids": end_ids, "pad_id": pad_id}
    answering = begin(model, variables, batch, num_new=num_new, **ends)
    return advance(model, variables, answering, num_new, **ends).tokens_BT
