"""What stands in row i of a stage: epoch after epoch, each a pure function of (records, config, stage, its number)."""

import bisect
import dataclasses
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import grain
import numpy as np

from alignvlm_jax.config import Config, SourceConfig
from alignvlm_jax.data import lengths, mixture, packing
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.packing import Plan
from alignvlm_jax.errors import UserError

MIXTURE, TASKS, PLAN, TURNS = range(1, 5)
"""What randomness is for: drawn from one seed, two of them would be the same numbers."""
MAX_EPOCHS = 3
"""Kept in memory: rows are read ahead, across the end of an epoch."""


class Pick(NamedTuple):
    """A record of a row, by its index over all sources, what is asked of it, and the chance in that."""

    record: int
    task: str
    rng: np.random.Generator


class Schedule(Protocol):
    """The rows of a stage. Several threads may ask.

    Attributes:
      num_unused: records that are in no row: they lack what the tasks need, or have more images than tiles.
    """

    num_unused: int

    def picks(self, row: int) -> list[Pick]:
        """Returns the records of a row."""

    def num_records(self, row: int) -> int:
        """Returns how many they are."""

    def counters(self, next_row: int) -> dict[str, float]:
        """Returns what the rows before `next_row` held, for metrics."""


class NothingToDraw(UserError):
    """No record is of use to any task."""


def make(config: Config, split: str, sizes: Sequence[int], seed: Sequence[int], tokenizer: Path) -> Schedule:
    """Returns the rows of a split of so many records in each of `config.data.folders`.

    Raises:
      UserError: rows are planned, and there is no index for it; see `lengths.load`.
      NothingToDraw: the index knows no record of use to any task.
    """
    if config.data.packing == "none":
        return Mixed(config, sizes, None, seed) if config.data.sources else Shuffled(config, sizes[0], seed)
    tasks, _ = task_shares(config)
    return Mixed(config, sizes, lengths.load(config, split, tasks, sizes, tokenizer), seed)


class Shuffled:
    """A record a row, each of a folder's once an epoch."""

    num_unused = 0

    def __init__(self, config: Config, size: int, seed: Sequence[int]):
        self._size, self._seed = size, seed
        shuffle_seed = int(np.random.default_rng(seed).integers(2**32))
        self.order = grain.MapDataset.range(size).shuffle(shuffle_seed).repeat()
        self._tasks, shares = task_shares(config)
        self._bounds = np.cumsum(shares) / np.sum(shares)

    def picks(self, row: int) -> list[Pick]:
        """See Schedule."""
        rng = np.random.default_rng([*self._seed, row])
        # What rng.choice does with shares, without its checks, which take longer than the rest.
        task = self._tasks[np.searchsorted(self._bounds, rng.random(), side="right")]
        return [Pick(self.order[row], task, rng)]

    def num_records(self, row: int) -> int:
        """See Schedule."""
        return 1

    def counters(self, next_row: int) -> dict[str, float]:
        """See Schedule."""
        return {"epoch": next_row / self._size, "records": next_row}


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The rows of an epoch. The plan's records are places in the other arrays, of N."""

    number: int
    begin: int  # rows of all epochs before
    plan: Plan
    records: np.ndarray  # int32 [N], over all sources
    tasks: np.ndarray  # int8 [N]
    tokens: np.ndarray | None  # int32 [N], where lengths are known

    @property
    def end(self) -> int:
        """Rows of all epochs up to this one's end."""
        return self.begin + len(self.plan.offsets) - 1

    def places(self, begin: int, end: int) -> np.ndarray:
        """Returns the places of rows begin to end, counted over the stage."""
        offsets = self.plan.offsets
        return self.plan.records[offsets[begin - self.begin] : offsets[end - self.begin]]


class Mixed:
    """Records of one or more sources; where their lengths are known, as many a row as the plan puts into it.

    A record is asked a task that it has what is needed for, drawn by the tasks' shares. What is of no use to any is no
    part of the mixture.
    """

    def __init__(self, config: Config, sizes: Sequence[int], known: Lengths | None, seed: Sequence[int]):
        """`sizes` and `known` lengths are of the sources' records in the order of `config.data.folders`.

        Raises:
          NothingToDraw: there are no records to draw from.
        """
        data = config.data
        self._sources = {name: data.sources[name] for name in sorted(data.sources)} or {"": SourceConfig()}
        self._starts = np.cumsum([0, *sizes])
        self._lengths, self._seed = known, seed
        self._row_length, self._max_tiles = data.row_length, data.max_tiles
        self._tasks, self._shares = task_shares(config)
        is_usable = np.ones(sum(sizes), bool) if known is None else known.tokens.any(axis=0)
        bounds = itertools.pairwise(self._starts)
        self._usable = {
            name: (a + np.flatnonzero(is_usable[a:b])).astype(np.int32)
            for name, (a, b) in zip(self._sources, bounds, strict=True)
        }
        usable_sizes = {name: len(records) for name, records in self._usable.items()}
        self._counts = mixture.counts(usable_sizes, self._sources, data.temperature)
        self.num_unused = sum(sizes) - sum(usable_sizes.values())
        if not any(self._counts.values()):
            raise NothingToDraw(
                f"none of {sum(sizes)} records in {', '.join(data.folders)} has text for config.data.tasks "
                f"{', '.join(self._tasks)}, at most {data.tiles_of_a_record} images, and a source with a weight"
            )
        self._lock = threading.Lock()
        self._begins = [0]
        self._epochs: dict[int, Epoch] = {}
        self._told = 0, np.zeros(len(self._sources), np.int64), np.zeros(len(self._sources), np.int64)

    def picks(self, row: int) -> list[Pick]:
        """See Schedule."""
        epoch = self.epoch_at(row)
        return [
            Pick(
                int(epoch.records[place]),
                self._tasks[epoch.tasks[place]],
                np.random.default_rng([*self._seed, TURNS, epoch.number, place]),
            )
            for place in epoch.places(row, row + 1).tolist()
        ]

    def num_records(self, row: int) -> int:
        """See Schedule."""
        return len(self.epoch_at(row).places(row, row + 1))

    def counters(self, next_row: int) -> dict[str, float]:
        """See Schedule. They grow over epochs; `fill` is the share of all slots so far that were planned for tokens."""
        row, records, tokens = self._told if self._told[0] <= next_row else (0, *np.zeros((2, len(self._sources)), int))
        while row < next_row:
            epoch = self.epoch_at(row)
            end = min(next_row, epoch.end)
            places = epoch.places(row, end)
            sources = np.searchsorted(self._starts, epoch.records[places], side="right") - 1
            records = records + np.bincount(sources, minlength=len(records))
            if epoch.tokens is not None:
                # As floats, bincount's weights, whole numbers are exact up to 2**53.
                of_rows = np.bincount(sources, weights=epoch.tokens[places], minlength=len(tokens))
                tokens = tokens + of_rows.astype(np.int64)
            row = end
        self._told = row, records, tokens
        epoch = self.epoch_at(max(row - 1, 0))
        progress = epoch.number + (row - epoch.begin) / (epoch.end - epoch.begin)
        told = {"epoch": progress} | self._by_source("records", records)
        if self._lengths is None:
            return told
        return told | self._by_source("tokens", tokens) | {"fill": float(tokens.sum() / max(row * self._row_length, 1))}

    def epoch_at(self, row: int) -> Epoch:
        """Returns the epoch that holds a row. Where it begins only the epochs before it know."""
        with self._lock:
            while self._begins[-1] <= row:
                number = len(self._begins) - 1
                self._begins.append(self._epoch(number).end)
            return self._epoch(bisect.bisect_right(self._begins, row) - 1)

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            self._epochs[number] = self._make(number)
            if len(self._epochs) > MAX_EPOCHS:
                del self._epochs[next(iter(self._epochs))]  # the one made first
        return self._epochs[number]

    def _make(self, number: int) -> Epoch:
        seed = [*self._seed, MIXTURE]
        parts = [
            usable[mixture.epoch_of(len(usable), self._counts[name], name, seed, number)]
            for name, usable in self._usable.items()
        ]
        records = np.concatenate(parts)
        tasks, seed = self._draw_tasks(records, number), [*self._seed, PLAN]
        if self._lengths is None:
            plan, tokens = packing.one_a_row(len(records), seed, number), None
        else:
            tokens, tiles = self._lengths.tokens[tasks, records], self._lengths.tiles[records]
            plan = packing.plan(tokens, tiles, self._row_length, self._max_tiles, seed, number)
        return Epoch(number, self._begins[number], plan, records, tasks, tokens)

    def _draw_tasks(self, records: np.ndarray, number: int) -> np.ndarray:
        """A task for each record, int8: of those that it has what is needed for."""
        drawn = np.random.default_rng([*self._seed, TASKS, number]).random(len(records), np.float32)
        bounds = np.zeros((len(self._tasks), len(records)), np.float32)
        for task, share in enumerate(self._shares):
            bounds[task] = share if self._lengths is None else share * (self._lengths.tokens[task, records] > 0)
        np.cumsum(bounds, axis=0, out=bounds)
        # Strictly below the last bound, whatever is rounded: a task of no use must not be drawn.
        drawn = np.minimum(drawn * bounds[-1], np.nextafter(bounds[-1], np.float32(0)))
        return (drawn >= bounds).sum(axis=0, dtype=np.int8)

    def _by_source(self, name: str, counts: np.ndarray) -> dict[str, float]:
        return {
            f"{name}/{source}" if source else name: int(count)
            for source, count in zip(self._sources, counts, strict=True)
        }


def task_shares(config: Config) -> tuple[list[str], np.ndarray]:
    """Returns the tasks that have a weight, and their shares of all."""
    # Sorted: the order of the config's mapping must not decide which record gets which task.
    tasks = sorted(task for task, weight in config.data.tasks.items() if weight)
    weights = np.array([config.data.tasks[task] for task in tasks])
    return tasks, weights / weights.sum()
