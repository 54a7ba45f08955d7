"""Generation of answers on a mesh; a row whose answer has ended can be given another prompt."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.inference import answering, decoding
from alignvlm_jax.inference.answering import Answering
from alignvlm_jax.models.decoder import CACHE_AXES, Cache
from alignvlm_jax.models.vlm import VLM, abstract_batch
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Int

PROMPT_FIELDS = ("tokens", "positions", "segment_ids", "tiles", "kept_patches")
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
        ends = {"end_ids": end_ids, "pad_id": pad_id}
        # Replicated, the tokens of all rows can be read on every process; `num_new` is static,
        # since it is part of the shapes of cache and tokens.
        self._generate = jax.jit(
            functools.partial(answering.generate, model, **ends),
            static_argnames="num_new",
            out_shardings=sharding.replicated(mesh),
        )
        # The same for all, or `advance` would compile anew for what it has returned itself.
        self._shardings = shardings = _shardings(mesh)
        self._begin = jax.jit(
            functools.partial(answering.begin, model, **ends),
            static_argnames="num_new",
            out_shardings=shardings,
        )
        self._idle = jax.jit(
            functools.partial(answering.idle, model, pad_id=pad_id),
            static_argnums=(0, 1, 2, 3),
            out_shardings=shardings,
        )
        # The cache is most of the memory: it is written in place.
        self._insert = jax.jit(
            functools.partial(answering.insert, model, mesh, **ends),
            donate_argnums=1,
            out_shardings=shardings,
        )
        self._advance = jax.jit(
            functools.partial(answering.advance, model, **ends),
            donate_argnums=1,
            out_shardings=shardings,
        )

    @property
    def num_programs(self) -> int:
        """How many programs were compiled."""
        programs = self._generate, self._begin, self._idle, self._insert, self._advance
        return sum(program._cache_size() for program in programs)

    @property
    def data_parallel_size(self) -> int:
        """Over how many devices the rows of a batch are spread: it must divide the batch."""
        return mesh_lib.data_parallel_size(self._mesh)

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

    def idle(
        self, size: int, length: int, max_new_tokens: int, *, is_greedy: bool = True
    ) -> Answering:
        """Returns a batch of `size` rows that have nothing to do, for prompts of up to `length`
        tokens; only greedy ones, of batches without `decoding.DTYPES`, or only others."""
        with mesh_lib.use(self._mesh):
            return self._idle(size, length, max_new_tokens, is_greedy)

    def insert(
        self,
        variables: Mapping,
        state: Answering,
        batch: Mapping[str, np.ndarray],
        rows: Int[np.ndarray, "new"],
    ) -> Answering:
        """Returns the answers with others in the place of some rows, which have their first token.

        `state` is used up. Each shape of batch compiles one program.

        Args:
          batch: prompts as of `generate`, n of all processes; not longer than those `state` has
            room for.
          rows: where each goes, the same on all processes, among those on its own device: with n
            prompts and B rows over d devices, prompt j is on device j // (n / d) and row i on i //
            (B / d). A prompt whose row is B goes nowhere.
        """
        with mesh_lib.use(self._mesh):
            return self._insert(variables, state, self._put(batch), rows.astype(np.int32))

    def advance(
        self, variables: Mapping, state: Answering, num_steps: int, num_working: int = 0
    ) -> Answering:
        """Returns the answers with at most `num_steps` tokens more, fewer where `num_working` rows
        or less are still at work; the same program for every number.

        `state` is used up.
        """
        with mesh_lib.use(self._mesh):
            return self._advance(variables, state, np.int32(num_steps), np.int32(num_working))

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

    def lower_batching(
        self, variables: Mapping, prompts: Mapping, size: int, max_new_tokens: int
    ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """Returns the programs that `insert` and `advance` run, as `lower`.

        Args:
          variables: as of `generate`.
          prompts: those that are read at once, as long as any is.
          size: rows of the batch that they are put into.
          max_new_tokens: of an answer.
        """
        number, length = prompts["tokens"].shape
        rows = jax.ShapeDtypeStruct((number,), np.int32)
        step = jax.ShapeDtypeStruct((), np.int32)
        with mesh_lib.use(self._mesh):
            idle = self._idle.eval_shape(size, length, max_new_tokens, True)
            state = jax.tree.map(
                lambda its, field: jax.tree.map(lambda x: x.update(sharding=its), field),
                self._shardings,
                idle,
            )
            insert = self._insert.lower(variables, state, prompts, rows)
            return insert, self._advance.lower(variables, state, step, step)


def _shardings(mesh: Mesh) -> Any:
    """The shardings of an `Answering` between two calls: all but the cache can be read anywhere."""
    everywhere = sharding.replicated(mesh)
    cache = sharding.of_axes(CACHE_AXES, mesh)
    return Answering(*[everywhere] * len(Answering._fields))._replace(
        cache=Cache(cache, cache, everywhere)
    )


def abstract_prompts(
    config: Config, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a batch of the longest prompts of a config."""
    length = config.longest_prompt
    tiles = config.data.tiles_of_a_record
    data = dataclasses.replace(config.data, max_tiles=tiles, seq_len=length)
    shapes = abstract_batch(config.model, data, batch_size)
    rows = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)
        for name, x in shapes.items()
        if name in PROMPT_FIELDS
    }
