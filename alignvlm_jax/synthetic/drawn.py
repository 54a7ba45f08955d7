"""Data sets that are drawn: shards of records, each a pure function of its split and its number."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.data import tokenizers
from alignvlm_jax.data.record import Record
from alignvlm_jax.ingest import executors, staging

SHARD_SIZE = 1000

Draw = Callable[[str, int], Record]
"""Returns the record of a split with this number; worker processes get it pickled."""


@dataclasses.dataclass(frozen=True)
class DrawnSet:
    """A data set that is drawn.

    Attributes:
      sizes: the number of records of each split.
      description: all that the records depend on, as prepare.json has it.
      open: returns what draws them, after a check of all that it needs.
      finish: called with the folder once all shards are there, for what else it holds.
      reads: folders that the records are made of, by their flags.
    """

    sizes: Mapping[str, int]
    description: dict[str, Any]
    open: Callable[[], Draw]
    finish: Callable[[Path], None] = lambda folder: None
    reads: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Shard(NamedTuple):
    """A shard to write: the file, and the records `start` to `stop` of a split."""

    path: str
    split: str
    start: int
    stop: int


def prepare(out: Path, data: DrawnSet, num_workers: int, overwrite: bool = False) -> bool:
    """Writes a data set to the folder `out`, or resumes a run that was interrupted; returns False
    where the folder was whole before.

    Args:
      out: the folder.
      data: what it shall hold; of another description a folder holds other data.
      num_workers: processes that draw.
      overwrite: whether it may take the place of what other values made.

    Raises:
      UserError: a package or a source is missing, `out` is one of the folders that are read, other
        values made the folder, or a shard cannot be written.
    """
    staging.check_out(out, **data.reads)
    if staging.is_ready(out, data.description):
        return False
    if not overwrite:
        staging.check_flags(out, data.description, data.sizes)
    # Before there is a folder: what is refused should leave none.
    draw = data.open()
    folder = staging.partial_folder(out, data.description)
    _write_shards(folder, data.sizes, draw, num_workers)
    data.finish(folder)
    if not overwrite and any((folder / name).exists() for name in tokenizers.NAMES):
        staging.check_tokenizer(out, data.sizes, folder)
    staging.publish(out, folder, os.listdir(folder), data.sizes, data.description)
    return True


def _write_shards(folder: Path, sizes: Mapping[str, int], draw: Draw, num_workers: int) -> None:
    # A shard appears whole: one that is there need not be written again.
    shards = [shard for shard in _plan(folder, sizes) if not Path(shard.path).exists()]
    if not shards:
        return
    write = functools.partial(_write_shard, draw)
    for _ in track(executors.run(write, shards, num_workers), "Drawing records", total=len(shards)):
        pass


def _plan(folder: Path, sizes: Mapping[str, int]) -> list[Shard]:
    shards = []
    for split, size in sizes.items():
        # 2,500 records: 0, 1000, 2000, 2500.
        bounds = [*range(0, size, SHARD_SIZE), size]
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            name = shards_lib.shard_name(split, index, len(bounds) - 1)
            shards.append(Shard(str(folder / name), split, start, stop))
    return shards


def _write_shard(draw: Draw, shard: Shard) -> Iterator[None]:
    # A generator, as `executors.run` takes it: each shard yields once, for the progress bar.
    numbers = range(shard.start, shard.stop)
    shards_lib.write_shard(shard.path, (draw(shard.split, number) for number in numbers))
    yield
