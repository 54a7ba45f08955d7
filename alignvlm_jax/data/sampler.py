"""What stands in row i of a stage: epoch after epoch, each a pure function of (records, config,
stage, its number)."""

import bisect
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from alignvlm_jax.config import Config, SourceConfig
from alignvlm_jax.data import lengths, mixture, packing
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.mixture import task_fractions
from alignvlm_jax.data.packing import Packing
from alignvlm_jax.errors import UserError

MIXTURE, TASKS, PLAN, TURNS = range(1, 5)
"""What randomness is for: drawn from one seed, two of them would be the same numbers."""
MAX_EPOCHS = 3
"""Kept in memory: rows are read ahead, across the end of an epoch, and the next one is planned by
then."""


class Pick(NamedTuple):
    """A record of a row, by its index over all sources, what is asked of it, and the chance in
    that."""

    record: int
    task: str
    rng: np.random.Generator


class Schedule(Protocol):
    """The rows of a stage. Several threads may ask.

    Attributes:
      num_unused: records that are in no row: they lack what the tasks need, or have more images
        than tiles.
    """

    num_unused: int

    def picks(self, index: int) -> list[Pick]:
        """Returns the records of a row."""

    def records(self, index: int) -> list[int]:
        """Returns their indexes alone."""

    def num_records(self, index: int) -> int:
        """Returns how many they are."""

    def counters(self, next_sequence: int) -> dict[str, float]:
        """Returns what the rows before `next_sequence` held, for metrics."""

    def state(self) -> dict[str, Any]:
        """Returns what is known of rows by having planned them, for a checkpoint: a dict for
        JSON."""

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Takes what `state` gave, so that epochs before are not planned again. Returns False, with
        nothing taken, of a state that is damaged, or that other data, another config or another way
        of planning gave."""


class NothingToDraw(UserError):
    """No record is of use to any task."""


def make(
    config: Config,
    split: str,
    sizes: Sequence[int],
    seed: Sequence[int],
    tokenizer: str | os.PathLike,
) -> Schedule:
    """Returns the rows of a split of so many records in each of `config.data.folders`.

    Raises:
      UserError: rows are planned, and there is no index for it; see `lengths.load`.
      NothingToDraw: the index knows no record of use to any task.
    """
    if config.data.packing == "none":
        return (
            Mixed(config, sizes, None, seed)
            if config.data.sources
            else Shuffled(config, sizes[0], seed)
        )
    tasks, _ = task_fractions(config)
    return Mixed(config, sizes, lengths.load(config, split, tasks, sizes, tokenizer), seed)


class Shuffled:
    """A record a row, each of a folder's once an epoch."""

    num_unused = 0

    def __init__(self, config: Config, size: int, seed: Sequence[int]):
        self._size = size
        self._seed = seed
        shuffle_seed = int(np.random.default_rng(seed).integers(2**32))
        self.order = grain.MapDataset.range(size).shuffle(shuffle_seed).repeat()
        self._tasks, fractions = task_fractions(config)
        self._bounds = np.cumsum(fractions) / np.sum(fractions)

    def picks(self, index: int) -> list[Pick]:
        """See Schedule."""
        rng = np.random.default_rng([*self._seed, index])
        # What rng.choice does with shares, without its checks, which take longer than the rest.
        task = self._tasks[np.searchsorted(self._bounds, rng.random(), side="right")]
        return [Pick(self.order[index], task, rng)]

    def records(self, index: int) -> list[int]:
        """See Schedule."""
        return [self.order[index]]

    def num_records(self, index: int) -> int:
        """See Schedule."""
        return 1

    def counters(self, next_sequence: int) -> dict[str, float]:
        """See Schedule."""
        return {"epoch": next_sequence / self._size, "records": next_sequence}

    def state(self) -> dict[str, Any]:
        """See Schedule."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """See Schedule."""
        return not state


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The rows of an epoch. The plan's records are places in the other arrays, of N."""

    number: int
    begin: int  # rows of all epochs before
    plan: Packing
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


class Told(NamedTuple):
    """What the rows before a row held, by source."""

    index: int
    records: np.ndarray  # int64 [sources]
    tokens: np.ndarray  # int64 [sources]


class Mixed:
    """Records of one or more sources; where their lengths are known, as many a row as the plan puts
    into it.

    A record is asked a task that it has what is needed for, drawn by the tasks' shares. What is of
    no use to any is no part of the mixture.
    """

    def __init__(
        self, config: Config, sizes: Sequence[int], known: Lengths | None, seed: Sequence[int]
    ):
        """`sizes` and `known` lengths are of the sources' records in the order of
        `config.data.folders`.

        Raises:
          NothingToDraw: there are no records to draw from.
        """
        data = config.data
        self._sources = {name: data.sources[name] for name in sorted(data.sources)} or {
            "": SourceConfig()
        }
        self._starts = np.cumsum([0, *sizes])
        self._lengths = known
        self._seed = seed
        self._seq_len = data.seq_len
        self._max_tiles = data.max_tiles
        self._tasks, self._fractions = task_fractions(config)
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
                f"none of {sum(sizes)} records in {', '.join(data.folders)} has text for "
                f"config.data.tasks {', '.join(self._tasks)}, at most {data.tiles_of_a_record} "
                "images, and a source with a weight"
            )
        self._num_sequences = config.train.num_steps * config.train.batch_size
        self._lock = threading.Lock()
        self._begins = [0]
        self._epochs: collections.OrderedDict[int, Future[Epoch]] = collections.OrderedDict()
        nothing = np.zeros(len(self._sources), np.int64)
        self._told = Told(0, nothing, nothing)

    def picks(self, index: int) -> list[Pick]:
        """See Schedule."""
        epoch = self.epoch_at(index)
        return [
            Pick(
                int(epoch.records[place]),
                self._tasks[epoch.tasks[place]],
                np.random.default_rng([*self._seed, TURNS, epoch.number, place]),
            )
            for place in epoch.places(index, index + 1).tolist()
        ]

    def records(self, index: int) -> list[int]:
        """See Schedule."""
        epoch = self.epoch_at(index)
        return epoch.records[epoch.places(index, index + 1)].tolist()

    def num_records(self, index: int) -> int:
        """See Schedule."""
        return len(self.epoch_at(index).places(index, index + 1))

    def counters(self, next_sequence: int) -> dict[str, float]:
        """See Schedule.

        They grow over epochs; `fill` is the fraction of all slots so far that were planned for
        tokens.
        """
        nothing = np.zeros(len(self._sources), np.int64)
        told = self._told if self._told.index <= next_sequence else Told(0, nothing, nothing)
        while told.index < next_sequence:
            told = self._tell(told, next_sequence)
        self._told = index, records, tokens = told
        result = {"epoch": self._progress(index)} | self._by_source("records", records)
        if self._lengths is None:
            return result
        packing_efficiency = float(tokens.sum() / max(index * self._seq_len, 1))
        return (
            result | self._by_source("tokens", tokens) | {"packing_efficiency": packing_efficiency}
        )

    def state(self) -> dict[str, Any]:
        """See Schedule."""
        with self._lock:
            begins = list(self._begins)
            told = self._told
        values = {
            "begins": begins,
            "row": told.index,
            "records": told.records.tolist(),
            "tokens": told.tokens.tolist(),
        }
        return values | {"digest": self._digest(values)}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """See Schedule."""
        values = {name: value for name, value in state.items() if name != "digest"}
        if state.get("digest") != self._digest(values):
            return False
        with self._lock:
            if len(values["begins"]) > len(self._begins):
                self._begins = list(values["begins"])
            self._told = Told(
                values["row"], *(np.array(values[name], np.int64) for name in ("records", "tokens"))
            )
        return True

    def epoch_at(self, index: int) -> Epoch:
        """Returns the epoch that holds a row. Where it begins only the epochs before it know."""
        while True:
            with self._lock:
                # A row a record: no plan has to count them.
                while self._lengths is None and self._begins[-1] <= index:
                    self._begins.append(self._begins[-1] + sum(self._counts.values()))
                known = self._begins[-1] > index
                number = len(self._begins) - 1
                if known:
                    number = bisect.bisect_right(self._begins, index) - 1
            epoch = self._epoch(number)
            if known:
                return epoch

    def _tell(self, told: Told, next_sequence: int) -> Told:
        """Adds the rows up to `next_sequence` or the end of an epoch; without lengths a whole one
        is what it always is."""
        index, records, tokens = told
        size = sum(self._counts.values())
        if self._lengths is None and index % size == 0 and index + size <= next_sequence:
            return Told(index + size, records + list(self._counts.values()), tokens)
        epoch = self.epoch_at(index)
        end = min(next_sequence, epoch.end)
        places = epoch.places(index, end)
        sources = np.searchsorted(self._starts, epoch.records[places], side="right") - 1
        records = records + np.bincount(sources, minlength=len(records))
        if epoch.tokens is not None:
            # As floats, bincount's weights, whole numbers are exact up to 2**53.
            of_rows = np.bincount(sources, weights=epoch.tokens[places], minlength=len(tokens))
            tokens = tokens + of_rows.astype(np.int64)
        return Told(end, records, tokens)

    def _progress(self, index: int) -> float:
        """Epochs in the rows before `row`."""
        if not index:
            return 0.0
        with self._lock:
            number = bisect.bisect_left(self._begins, index) - 1
            if number + 1 < len(self._begins):
                begin, end = self._begins[number : number + 2]
                return number + (index - begin) / (end - begin)
        epoch = self.epoch_at(index - 1)
        return epoch.number + (index - epoch.begin) / (epoch.end - epoch.begin)

    def _epoch(self, number: int) -> Epoch:
        """The plan of an epoch whose begin is known. That of the next is begun, where the stage
        gets there, so that nobody has to wait for it."""
        with self._lock:
            planned = self._planned(number)
        epoch = planned.result()
        with self._lock:
            if epoch.end < self._num_sequences and number + 1 not in self._epochs:
                self._planned(number + 1)
        return epoch

    def _planned(self, number: int) -> Future[Epoch]:
        """What has planned an epoch, or does; called with the lock."""
        if number in self._epochs:
            self._epochs.move_to_end(number)
            return self._epochs[number]
        planned = self._epochs[number] = Future()
        # A daemon: whoever stops does not wait for a plan that nobody will see.
        threading.Thread(
            target=self._plan, args=(number, planned), name=f"plan-{number}", daemon=True
        ).start()
        if len(self._epochs) > MAX_EPOCHS:
            self._epochs.popitem(last=False)  # the one that nobody asked for the longest
        return planned

    def _plan(self, number: int, planned: Future[Epoch]) -> None:
        try:
            epoch = self._make(number)
            with self._lock:
                if number + 1 == len(self._begins):
                    self._begins.append(epoch.end)
                expected = self._begins[number + 1]
            if epoch.end != expected:
                raise RuntimeError(
                    f"epoch {number} was planned to row {expected} before, and is now to "
                    f"{epoch.end}"
                )
            planned.set_result(epoch)
        except BaseException as err:  # whoever waits has to know
            planned.set_exception(err)

    def _digest(self, values: Mapping[str, Any]) -> str:
        """A checksum of a state's values and of all that they follow from."""
        return hashlib.blake2b(
            json.dumps([values, self._causes]).encode(), digest_size=8
        ).hexdigest()

    @functools.cached_property
    def _causes(self) -> list[Any]:
        """What decides about the plans, in short; the last is the way of planning itself."""
        digest = hashlib.blake2b(digest_size=8)
        if self._lengths is not None:
            digest.update(np.ascontiguousarray(self._lengths.tokens))
            digest.update(np.ascontiguousarray(self._lengths.tiles))
        sizes = [
            self._starts.tolist(),
            self._seq_len,
            self._max_tiles,
            list(self._counts.items()),
        ]
        tasks = [self._tasks, self._fractions.tolist()]
        return [digest.hexdigest(), list(map(int, self._seed)), sizes, tasks, _probe()]

    def _make(self, number: int) -> Epoch:
        seed = [*self._seed, MIXTURE]
        parts = [
            usable[mixture.epoch_of(len(usable), self._counts[name], name, seed, number)]
            for name, usable in self._usable.items()
        ]
        records = np.concatenate(parts)
        tasks = self._draw_tasks(records, number)
        seed = [*self._seed, PLAN]
        if self._lengths is None:
            plan = packing.unpacked(len(records), seed, number)
            tokens = None
        else:
            tokens = self._lengths.tokens[tasks, records]
            tiles = self._lengths.tiles[records]
            plan = packing.plan(tokens, tiles, self._seq_len, self._max_tiles, seed, number)
        return Epoch(number, self._begins[number], plan, records, tasks, tokens)

    def _draw_tasks(self, records: np.ndarray, number: int) -> np.ndarray:
        """A task for each record, int8: of those that it has what is needed for."""
        drawn = np.random.default_rng([*self._seed, TASKS, number]).random(len(records), np.float32)
        bounds = np.zeros((len(self._tasks), len(records)), np.float32)
        for task, fraction in enumerate(self._fractions):
            bounds[task] = (
                fraction
                if self._lengths is None
                else fraction * (self._lengths.tokens[task, records] > 0)
            )
        np.cumsum(bounds, axis=0, out=bounds)
        # Strictly below the last bound, whatever is rounded: a task of no use must not be drawn.
        drawn = np.minimum(drawn * bounds[-1], np.nextafter(bounds[-1], np.float32(0)))
        return (drawn >= bounds).sum(axis=0, dtype=np.int8)

    def _by_source(self, name: str, counts: np.ndarray) -> dict[str, float]:
        return {
            f"{name}/{source}" if source else name: int(count)
            for source, count in zip(self._sources, counts, strict=True)
        }


@functools.cache
def _probe() -> str:
    """A checksum of the plan of a few records: another one where plans are made in another way."""
    sizes = np.arange(500)
    plan = packing.plan(sizes % 97 + 1, sizes % 3, 100, 4, [1, 2], 3)
    drawn = mixture.epoch_of(100, 150, "probe", [1, 2], 3)
    digest = hashlib.blake2b(digest_size=8)
    for array in (plan.offsets, plan.records, drawn):
        digest.update(array.astype(np.int64))
    return digest.hexdigest()
