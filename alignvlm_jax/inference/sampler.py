"""Generation: prefill once, then a token at a time from the KV cache, all rows of a batch
together."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.inference import decoding
from alignvlm_jax.models.decoder import CACHE_AXES, Cache
from alignvlm_jax.models.vlm import VLM, abstract_batch
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Bool, Float, Int

PROMPT_FIELDS = ("tokens", "positions", "segment_ids", "tiles")
NOISE_FIELDS = ("noise_sigma", "noise_seed")


class Answering(NamedTuple):
    """Answers of a batch of prompts in the midst of generation.

    S = T + num_new slots of the cache: those of the prompts, then one for each new token.

    Attributes:
      step: how many tokens each answer has.
      token_B: the newest of each, not yet read.
      finished_B: which answers have come to their end.
      tokens_BT: the answers so far, [B, num_new], with padding after.
      cache: keys and values of what was read.
      is_prompt_BS: the slots with tokens of prompts.
      decoding: the arrays `decoding.DTYPES`, or none.
      seen_BV: the tokens of each prompt and answer; None without `decoding`.
    """

    step: Int[Array, ""]
    token_B: Int[Array, "B"]
    finished_B: Bool[Array, "B"]
    tokens_BT: Int[Array, "B T"]
    cache: Cache
    is_prompt_BS: Bool[Array, "B S"]
    decoding: dict[str, Array]
    seen_BV: Bool[Array, "B V"] | None

    def with_next(
        self, logits_BV: Float[Array, "B V"], end_ids: tuple[int, ...], pad_id: int
    ) -> "Answering":
        """Returns the answers with one token more."""
        if self.seen_BV is None:
            token_B = logits_BV.argmax(-1).astype(jnp.int32)
            seen_BV = None
        else:
            token_B = decoding.choose(logits_BV, self.seen_BV, self.decoding, self.step)
            seen_BV = self.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        # A row that has ended goes on with padding while others are still at work.
        token_B = jnp.where(self.finished_B, pad_id, token_B)
        return self._replace(
            step=self.step + 1,
            token_B=token_B,
            finished_B=self.finished_B | jnp.isin(token_B, jnp.array(end_ids)),
            tokens_BT=self.tokens_BT.at[:, self.step].set(token_B),
            seen_BV=seen_BV,
        )


class Sampler:
    """Generates answers on a mesh.

    Args:
      model: the model.
      mesh: over which rows are spread.
      end_ids: the tokens that end an answer.
      pad_id: what the rest of a row is filled with.
    """

    def __init__(self, model: VLM, mesh: Mesh, *, end_ids: tuple[int, ...], pad_id: int) -> None:
        self._mesh = mesh
        ends = {"end_ids": end_ids, "pad_id": pad_id}
        generate = functools.partial(_generate, model, **ends)
        # Replicated, the tokens of all rows can be read on every process; `num_new` is static,
        # since it is part of the shapes of cache and tokens.
        self._generate = jax.jit(
            generate, static_argnames="num_new", out_shardings=sharding.replicated(mesh)
        )
        # The same for both, or `advance` would compile anew for what it has returned itself.
        shardings = _shardings(mesh)
        self._begin = jax.jit(
            functools.partial(_begin, model, **ends),
            static_argnames="num_new",
            out_shardings=shardings,
        )
        # The cache is most of the memory: it is written in place.
        self._advance = jax.jit(
            functools.partial(_advance, model, **ends), donate_argnums=1, out_shardings=shardings
        )

    def rows_of_process(self, size: int) -> Int[np.ndarray, "n"]:
        """Returns the rows of a batch of `size` that this process hands in: int64, ascending."""
        return sharding.rows_of_process(self._mesh, size)

    def generate(
        self, variables: Mapping, batch: Mapping[str, np.ndarray], max_new_tokens: int
    ) -> Int[np.ndarray, "B {max_new_tokens}"]:
        """Returns each row's answer up to and with the end token, then padding, int32.

        Args:
          variables: what the model is applied to: "params", sharded over the mesh, and whatever
            else.
          batch: one prompt a row, as `ExampleBuilder.prompt` makes it; those of `rows_of_process`
            of the global batch. A batch without "tiles" has no image tokens. One with NOISE_FIELDS
            is seen through noise: `VLM.features`. One with the arrays `decoding.DTYPES` is
            answered as these say, another greedily.
          max_new_tokens: static; another value or batch shape compiles anew.
        """
        with mesh_lib.use(self._mesh):
            return np.asarray(self._generate(variables, self._put(batch), num_new=max_new_tokens))

    def begin(
        self, variables: Mapping, batch: Mapping[str, np.ndarray], max_new_tokens: int
    ) -> Answering:
        """Returns the first token of each answer, for `advance`; arguments as of `generate`."""
        with mesh_lib.use(self._mesh):
            return self._begin(variables, self._put(batch), num_new=max_new_tokens)

    def advance(self, variables: Mapping, answering: Answering, until: int) -> Answering:
        """Returns the answers with `until` tokens, or fewer where all have ended: in the end the
        tokens of `generate`, and the same program for every `until`.

        `answering` is used up.
        """
        with mesh_lib.use(self._mesh):
            return self._advance(variables, answering, np.int32(until))

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        # Targets and loss weights, which a prompt has as well, do not travel to the devices.
        names = (*PROMPT_FIELDS, *NOISE_FIELDS, *decoding.DTYPES)
        return sharding.put_batch(
            {name: batch[name] for name in names if name in batch}, self._mesh
        )

    def lower(
        self, variables: Mapping, prompts: Mapping, max_new_tokens: int
    ) -> jax.stages.Lowered:
        """Returns the program that `generate` runs, of abstract arrays with shardings; the mesh may
        be one that is not there."""
        with mesh_lib.use(self._mesh):
            return self._generate.lower(variables, prompts, num_new=max_new_tokens)


def _shardings(mesh: Mesh) -> Any:
    """The shardings of an `Answering` between two calls: all but the cache can be read anywhere."""
    everywhere = sharding.replicated(mesh)
    cache = sharding.of_axes(CACHE_AXES, mesh)
    return Answering(*[everywhere] * len(Answering._fields))._replace(
        cache=Cache(cache, cache, everywhere)
    )


def _begin(
    model: VLM,
    variables: Mapping,
    batch: Mapping[str, Array],
    *,
    num_new: int,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Answering:
    """The first token of each answer."""
    is_prompt_BT = batch["segment_ids"] > 0
    size = len(is_prompt_BT)
    fields = {name: batch[name] for name in decoding.DTYPES if name in batch}
    seen_BV = None
    if fields:
        vocab_size = model.config.llm.vocab_size
        seen_BV = decoding.tokens_of_prompts(batch["tokens"], is_prompt_BT, vocab_size)
    # The only call with images: after it the cache is all that is known of them.
    logits_BV, cache = model.apply(variables, batch, num_new, method="prefill")
    answering = Answering(
        step=jnp.zeros((), jnp.int32),
        token_B=jnp.full(size, pad_id, jnp.int32),
        finished_B=jnp.zeros(size, bool),
        # A loop's carry keeps its shape, so that room for all tokens is there from the start.
        tokens_BT=jnp.full((size, num_new), pad_id, jnp.int32),
        cache=cache,
        is_prompt_BS=jnp.pad(is_prompt_BT, ((0, 0), (0, num_new))),
        decoding=fields,
        seen_BV=seen_BV,
    )
    return answering.with_next(logits_BV, end_ids, pad_id)


def _advance(
    model: VLM,
    variables: Mapping,
    answering: Answering,
    until: Int[Array, ""] | int,
    *,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Answering:
    """The answers with `until` tokens, or at their ends."""
    cache_length = answering.is_prompt_BS.shape[1]
    length = cache_length - answering.tokens_BT.shape[1]
    prompt_lengths_B = answering.is_prompt_BS.sum(-1)
    slots_S = jnp.arange(cache_length)

    def unfinished(answering: Answering) -> Bool[Array, ""]:
        # Decided on the devices: a loop in Python would wait for a token's transfer at every step.
        return (answering.step < until) & ~answering.finished_B.all()

    def advance(answering: Answering) -> Answering:
        """Reads the token of the step before and chooses this one: the last token of an answer is
        never read."""
        step = answering.step
        # New tokens stand after the padding of the longest prompt, but are counted from the end of
        # their own.
        is_new_S = (slots_S >= length) & (slots_S < length + step)
        logits_BV, cache = model.apply(
            variables,
            answering.token_B,
            prompt_lengths_B + step - 1,
            answering.is_prompt_BS | is_new_S,
            answering.cache,
            method="decode",
        )
        return answering._replace(cache=cache).with_next(logits_BV, end_ids, pad_id)

    return jax.lax.while_loop(unfinished, advance, answering)


def _generate(
    model: VLM,
    variables: Mapping,
    batch: Mapping[str, Array],
    *,
    num_new: int,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B {num_new}"]:
    # One program of both: nothing goes back to the host between prefill and the first token.
    ends = {"end_ids": end_ids, "pad_id": pad_id}
    answering = _begin(model, variables, batch, num_new=num_new, **ends)
    return _advance(model, variables, answering, num_new, **ends).tokens_BT


def abstract_prompts(
    config: Config, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a batch of the longest prompts that the sequences of
    a stage have room for."""
    # A prompt shows one record: it has room for that record's tiles, not for those of a packed
    # sequence.
    data = dataclasses.replace(config.data, max_tiles=config.data.tiles_of_a_record)
    shapes = abstract_batch(config.model, data, batch_size)
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        for name, x in shapes.items()
        if name in PROMPT_FIELDS
    }
