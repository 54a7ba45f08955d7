"""Tiles or prompts through a function of the model, a few at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich import progress
from rich.console import Console

from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import distributed, sharding
from alignvlm_jax.parallel import mesh as mesh_lib


def tiles_of(loaded: Loaded, records: Sequence[Record]) -> np.ndarray:
    """Returns all tiles that a question about each of the records would show, uint8 [n, Y, X, C].

    Raises:
      UserError: an image cannot be read, or there is none.
    """
    # Not those of prompts: where blank patches have no image tokens, that of a dense page may be
    # too long, and its patches can be looked at all the same.
    pages = [page.pixels for record in records for page in loaded.builder.tile_pages(record)]
    if not pages:
        raise UserError("the chosen records have no images")
    return np.concatenate(pages)


def map_tiles(
    loaded: Loaded,
    fn: Callable[[VLM, Mapping, Mapping[str, jax.Array]], Any],
    rows_of_one: Mapping[str, np.ndarray],
) -> Iterator[Any]:
    """Yields fn(model, variables, batch) of a few rows after a few: a tree of arrays with an entry
    for each of them. Of several processes all call this with the same rows, each feeds its own, and
    all get what comes out.

    Args:
      loaded: a batch has as many rows as its mesh spreads them over, so that `fn` may make all
        distributions of one.
      fn: a function of a module; compiled once.
      rows_of_one: "tiles", uint8 [n, Y, X, C], each a row by itself, and further arrays of the
        batch [n, ...].
    """
    # [n, Y, X, C] -> [n, 1, Y, X, C]: each a sequence of one tile.
    yield from map_rows(
        loaded, fn, {**rows_of_one, "tiles": rows_of_one["tiles"][:, None]}, "tiles"
    )


def map_rows(
    loaded: Loaded,
    fn: Callable[[VLM, Mapping, Mapping[str, jax.Array]], Any],
    every: Mapping[str, np.ndarray],
    name: str,
) -> Iterator[Any]:
    """Yields fn(model, variables, batch) of a few rows after a few, as `map_tiles`; `every` are the
    arrays of a batch [n, ...], and `name` is what progress calls a row."""
    total = len(next(iter(every.values())))
    size = loaded.data_parallel_size
    local_rows = sharding.rows_of_process(loaded.mesh, size)
    apply = _jitted(fn, loaded.model, loaded.mesh)
    for start in track(range(0, total, size), name):
        # Every batch has one shape: the last one repeats its last row.
        here = np.minimum(start + local_rows, total - 1)
        with mesh_lib.use(loaded.mesh):
            batch = sharding.put_batch(
                {name: array[here] for name, array in every.items()}, loaded.mesh
            )
            output = apply(loaded.variables, batch)
        count = min(size, total - start)
        yield jax.tree.map(lambda x, count=count: np.asarray(x)[:count], output)


def track(parts: Sequence[Any], name: str) -> Iterable[Any]:
    """Returns the parts of a work, and shows on stderr how many are done and the time left."""
    console = Console(stderr=True)
    return progress.track(
        parts, name, console=console, transient=True, disable=not distributed.is_main()
    )


# Trap: a function is its own key. One that is made anew for each call compiles each time.
@functools.lru_cache(maxsize=8)
def _jitted(
    fn: Callable, model: VLM, mesh: Mesh
) -> Callable[[Mapping, Mapping[str, jax.Array]], Any]:
    # Replicated: of an output that stays where its rows are a process could read only its own part.
    return jax.jit(functools.partial(fn, model), out_shardings=sharding.replicated(mesh))
