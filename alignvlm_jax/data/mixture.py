"""What an epoch consists of: which records of several sources, what is asked of each, and which
stand together in a packed sequence."""

import dataclasses
import functools
import hashlib
import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignvlm_jax.config import DataConfig, SourceConfig
from alignvlm_jax.data import packing
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.packing import Packing
from alignvlm_jax.errors import UserError

MIXTURE, TASKS, PLAN, TURNS = range(1, 5)
"""What randomness is for: made from one seed alone, two of them would be the same numbers."""


class NothingToDraw(UserError):
    """No record is of use to any task."""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The packed sequences of an epoch.

    Attributes:
      number: of the epoch, from 0.
      begin: the sequences of all epochs before it.
      plan: which records stand together; they are places in the arrays below, of N.
      records: int32 [N], over all sources.
      tasks: int8 [N].
      tokens: int32 [N], where lengths are known.
    """

    number: int
    begin: int
    plan: Packing
    records: np.ndarray
    tasks: np.ndarray
    tokens: np.ndarray | None

    @classmethod
    def of(cls, number: int, begin: int, arrays: Mapping[str, np.ndarray]) -> "Epoch":
        """Returns the epoch of these `arrays`."""
        plan = Packing(arrays["offsets"], arrays["places"])
        return cls(number, begin, plan, arrays["records"], arrays["tasks"], arrays.get("tokens"))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns its arrays by name, for a file."""
        found = {"offsets": self.plan.offsets, "places": self.plan.records}
        found |= {"records": self.records, "tasks": self.tasks}
        return found if self.tokens is None else found | {"tokens": self.tokens}

    @property
    def end(self) -> int:
        """The sequences of all epochs up to this one's end."""
        return self.begin + len(self.plan.offsets) - 1

    def places(self, begin: int, end: int) -> np.ndarray:
        """Returns the places of the sequences begin to end, counted over the stage."""
        # Offsets are of this epoch: of sequence i they are offsets[i] to offsets[i + 1].
        offsets = self.plan.offsets
        return self.plan.records[offsets[begin - self.begin] : offsets[end - self.begin]]


class Mixture:
    """The records of one or more sources, and how epochs are made of them.

    A record is asked a task that it has what is needed for, chosen by the tasks' fractions. What is
    of no use to any is no part of the mixture.

    Attributes:
      sources: by name; "" where there is but `data.dir`.
      starts: int64 [sources + 1], the first record of each.
      tasks: those that have a weight.
      counts: how many records an epoch takes of each source.
      num_unused: records that are of no use.
    """

    def __init__(
        self,
        data: DataConfig,
        sizes: Sequence[int],
        known: Lengths | None,
        seed: Sequence[int],
    ):
        """`sizes` and `known` lengths are of the sources' records in the order of `data.folders`.

        Raises:
          NothingToDraw: there are no records to draw from.
        """
        self.sources = {name: data.sources[name] for name in sorted(data.sources)} or {
            "": SourceConfig()
        }
        self.starts = np.cumsum([0, *sizes])
        self.tasks, self._fractions = task_fractions(data.tasks)
        self._lengths = known
        self._seed = seed
        self._seq_len = data.seq_len
        self._max_tiles = data.max_tiles
        # Which ones they are is found anew for each epoch: kept, they would be a fifth of all that
        # a process holds.
        self._usable_sizes = {
            name: sum(np.count_nonzero(self._is_usable(block)) for block in blocks)
            for name, blocks in self._blocks().items()
        }
        self.counts = counts(self._usable_sizes, self.sources, data.temperature)
        self.num_unused = sum(sizes) - sum(self._usable_sizes.values())
        if not any(self.counts.values()):
            raise NothingToDraw(
                f"none of {sum(sizes)} records in {', '.join(data.folders)} has text for "
                f"config.data.tasks {', '.join(self.tasks)}, at most {data.tiles_of_a_record} "
                "images, and a source with a weight"
            )

    def _blocks(self) -> dict[str, list[slice]]:
        """Returns the records of each source, in pieces."""
        return {
            name: [slice(a + one.start, a + one.stop) for one in packing.blocks(b - a)]
            for name, (a, b) in zip(
                self.sources, itertools.pairwise(self.starts.tolist()), strict=True
            )
        }

    def _is_usable(self, block: slice) -> np.ndarray:
        """Returns whether each of some records is of use to any task, bool [n]."""
        if self._lengths is None:
            return np.ones(block.stop - block.start, bool)
        return self._lengths.tokens[:, block].any(axis=0)

    def _usable(self, blocks: Sequence[slice]) -> np.ndarray:
        """Returns the records of use among those of a source, int32 [n]."""
        return np.concatenate(
            [
                np.zeros(0, np.int32),
                *(
                    (block.start + np.flatnonzero(self._is_usable(block))).astype(np.int32)
                    for block in blocks
                ),
            ]
        )

    def epoch(self, number: int, begin: int) -> Epoch:
        """Returns an epoch that follows `begin` sequences: always the same one."""
        seed = [*self._seed, MIXTURE]
        records = np.concatenate(
            [
                self._usable(blocks)[
                    epoch_of(self._usable_sizes[name], self.counts[name], name, seed, number)
                ]
                for name, blocks in self._blocks().items()
            ]
        )
        tasks = self._draw_tasks(records, number)
        seed = [*self._seed, PLAN]
        if self._lengths is None:
            plan = packing.unpacked(len(records), seed, number)
            return Epoch(number, begin, plan, records, tasks, None)
        tokens = self._lengths.tokens[tasks, records]
        tiles = self._lengths.tiles[records]
        plan = packing.plan(tokens, tiles, self._seq_len, self._max_tiles, seed, number)
        return Epoch(number, begin, plan, records, tasks, tokens)

    def count_tiles(self, records: np.ndarray) -> int:
        """Returns how many tiles some records have together, whose lengths are known."""
        return int(self._lengths.tiles[records].sum(dtype=np.int64))

    @functools.cached_property
    def causes(self) -> list[Any]:
        """What decides about the epochs, in short; the last is the way of planning itself."""
        digest = hashlib.blake2b(digest_size=8)
        if self._lengths is not None:
            digest.update(np.ascontiguousarray(self._lengths.tokens))
            digest.update(np.ascontiguousarray(self._lengths.tiles))
        sizes = [
            self.starts.tolist(),
            self._seq_len,
            self._max_tiles,
            list(self.counts.items()),
        ]
        tasks = [self.tasks, self._fractions.tolist()]
        return [digest.hexdigest(), list(map(int, self._seed)), sizes, tasks, _probe()]

    def _draw_tasks(self, records: np.ndarray, number: int) -> np.ndarray:
        """A task for each of N records, int8 [N]: of those that it has what is needed for."""
        rng = np.random.default_rng([*self._seed, TASKS, number])
        tasks = np.empty(len(records), np.int8)
        # Block after block draws the same numbers as all at once.
        for block in packing.blocks(len(records)):
            tasks[block] = self._tasks_of(records[block], rng)
        return tasks

    def _tasks_of(self, records: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawn = rng.random(len(records), np.float32)
        # float32 [tasks, N], summed over the tasks: task t has the interval from bounds[t - 1] to
        # bounds[t], which is empty where the record is of no use to it.
        bounds = np.zeros((len(self.tasks), len(records)), np.float32)
        for task, fraction in enumerate(self._fractions):
            bounds[task] = (
                fraction
                if self._lengths is None
                else fraction * (self._lengths.tokens[task, records] > 0)
            )
        np.cumsum(bounds, axis=0, out=bounds)
        # Strictly below the last bound, whatever is rounded: a task of no use must not be drawn.
        drawn = np.minimum(drawn * bounds[-1], np.nextafter(bounds[-1], np.float32(0)))
        # The bounds that are not above what was drawn: 0.5 among 0.2, 0.2, 1.0 is task 2; task 1 is
        # of no use.
        return (drawn >= bounds).sum(axis=0, dtype=np.int8)


def counts(
    sizes: Mapping[str, int], sources: Mapping[str, SourceConfig], temperature: float
) -> dict[str, int]:
    """Returns how many records an epoch takes of each source of so many records.

    Together they are as many as the sources with a weight have, times their repeats, less what caps
    take away. A source's share goes as weight * (size * repeat) ** (1 / temperature); with a weight
    above 0 it is never empty.
    """
    names = [name for name in sizes if sizes[name] and sources[name].weight]
    weights = np.array([sources[name].weight for name in names])
    repeated = np.array([sizes[name] * sources[name].repeat for name in names])
    # Less the largest, twice: at a low temperature powers overflow.
    logs = np.log(repeated)
    with np.errstate(over="ignore"):
        logs = np.log(weights) + (logs - logs.max(initial=-np.inf)) / temperature
    fractions = np.exp(logs - logs.max(initial=-np.inf))
    wanted = dict.fromkeys(sizes, 0)
    for name, fraction in zip(names, fractions / fractions.sum(), strict=True):
        count = max(1, round(repeated.sum() * fraction))
        wanted[name] = min(count, sources[name].cap or count)
    return wanted


def epoch_of(size: int, count: int, name: str, seed: Sequence[int], epoch: int) -> np.ndarray:
    """Returns the records, int32 [count], that an epoch takes of a source of `size` records.

    They are the next `count` of an endless stream that shuffles the source anew whenever it has
    gone through: over epochs no record is seen again before every other was seen.
    """
    if not count:
        return np.zeros(0, np.int32)
    begin = epoch * count
    end = (epoch + 1) * count
    # Of its name and not its place: a source that is added or left out does not change the others.
    seed = [*seed, zlib.crc32(name.encode())]
    # 3 records, 2 an epoch: epoch 1 has places 2 and 3 of the stream, the last of its first shuffle
    # and the first of its second.
    rounds = range(begin // size, -(-end // size))
    stream = np.concatenate(
        [packing.shuffled(size, np.random.default_rng([*seed, number])) for number in rounds]
    )
    return stream[begin % size : begin % size + count]


def task_fractions(weights: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """Returns the tasks that have a weight, and their fractions of all, float64 [tasks]."""
    # Sorted: the order of the config's mapping must not decide which record gets which task.
    tasks = sorted(task for task, weight in weights.items() if weight)
    fractions = np.array([weights[task] for task in tasks])
    return tasks, fractions / fractions.sum()


@functools.cache
def _probe() -> str:
    """A checksum of the plan of a few records: another one where plans are made in another way."""
    sizes = np.arange(500)
    plan = packing.plan(sizes % 97 + 1, sizes % 3, 100, 4, [1, 2], 3)
    drawn = epoch_of(100, 150, "probe", [1, 2], 3)
    digest = hashlib.blake2b(digest_size=8)
    for array in (plan.offsets, plan.records, drawn):
        digest.update(array.astype(np.int64))
    return digest.hexdigest()
