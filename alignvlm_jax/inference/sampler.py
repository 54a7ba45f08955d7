"""Greedy generation: prefill once, then a token at a time from the KV cache, all rows of a batch
together."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.models.vlm import VLM, abstract_batch
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Bool, Float, Int

PROMPT_FIELDS = ("tokens", "positions", "segment_ids", "tiles")
NOISE_FIELDS = ("noise_sigma", "noise_seed")


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
        generate = functools.partial(_generate, model, end_ids=end_ids, pad_id=pad_id)
        # Replicated, the tokens of all rows can be read on every process; `num_new` is static,
        # since it is part of the shapes of cache and tokens.
        self._generate = jax.jit(
            generate, static_argnames="num_new", out_shardings=sharding.replicated(mesh)
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
            is seen through noise: `VLM.features`.
          max_new_tokens: static; another value or batch shape compiles anew.
        """
        # Targets and loss weights, which a prompt has as well, do not travel to the devices.
        prompts = {name: batch[name] for name in (*PROMPT_FIELDS, *NOISE_FIELDS) if name in batch}
        prompts = sharding.put_batch(prompts, self._mesh)
        with mesh_lib.use(self._mesh):
            return np.asarray(self._generate(variables, prompts, num_new=max_new_tokens))

    def lower(
        self, variables: Mapping, prompts: Mapping, max_new_tokens: int
    ) -> jax.stages.Lowered:
        """Returns the program that `generate` runs, of abstract arrays with shardings; the mesh may
        be one that is not there."""
        with mesh_lib.use(self._mesh):
            return self._generate.lower(variables, prompts, num_new=max_new_tokens)


def _generate(
    model: VLM,
    variables: Mapping,
    batch: Mapping[str, Array],
    *,
    num_new: int,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B {num_new}"]:
    segment_ids = batch["segment_ids"]
    size, length = segment_ids.shape
    prompt_lengths_B = (segment_ids > 0).sum(-1)
    # [B, T] -> [B, S], S = T + num_new: the slots of the prompts, then one for each new token.
    is_prompt_BS = jnp.pad(segment_ids > 0, ((0, 0), (0, num_new)))
    slots_S = jnp.arange(length + num_new)

    def choose(
        logits_BV: Float[Array, "B V"],
        step: Int[Array, ""],
        finished_B: Bool[Array, "B"],
        tokens_BT: Int[Array, "B T"],
    ) -> tuple[Int[Array, "B"], Bool[Array, "B"], Int[Array, "B T"]]:
        """The token of a step, which rows have ended with it, and all tokens so far."""
        # A row that has ended goes on with padding while others are still at work.
        token_B = jnp.where(finished_B, pad_id, logits_BV.argmax(-1).astype(jnp.int32))
        return (
            token_B,
            finished_B | jnp.isin(token_B, jnp.array(end_ids)),
            tokens_BT.at[:, step].set(token_B),
        )

    def unfinished(carry) -> Bool[Array, ""]:
        # Decided on the devices: a loop in Python would wait for a token's transfer at every step.
        step, (_, finished_B, _), _ = carry
        return (step < num_new) & ~finished_B.all()

    def advance(carry):
        """Reads the token of the step before and chooses this one: the last token of an answer is
        never read."""
        step, (token_B, finished_B, tokens_BT), cache = carry
        # New tokens stand after the padding of the longest prompt, but are counted from the end of
        # their own.
        mask_BS = is_prompt_BS | ((slots_S >= length) & (slots_S < length + step))
        positions_B = prompt_lengths_B + step - 1
        logits_BV, cache = model.apply(
            variables, token_B, positions_B, mask_BS, cache, method="decode"
        )
        return step + 1, choose(logits_BV, step, finished_B, tokens_BT), cache

    logits_BV, cache = model.apply(variables, batch, num_new, method="prefill")
    # A loop's carry keeps its shape, so that room for all tokens [B, num_new] is there from the
    # start.
    nothing_yet = jnp.zeros(size, bool), jnp.full((size, num_new), pad_id, jnp.int32)
    first = choose(logits_BV, jnp.zeros((), jnp.int32), *nothing_yet)
    _, (_, _, tokens_BT), _ = jax.lax.while_loop(
        unfinished, advance, (jnp.ones((), jnp.int32), first, cache)
    )
    return tokens_BT


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
