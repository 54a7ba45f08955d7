"""What stands in packed sequence i of a stage: epoch after epoch, each a pure function of its
number, records, config and stage."""

import bisect
import collections
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import plan_file
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.mixture import TURNS, Epoch, Mixture, task_fractions

MAX_EPOCHS = 3
"""Kept in memory: sequences are read ahead across an epoch's end, when the next is planned."""


class Pick(NamedTuple):
    """A record of a sequence, by its index over all sources, what is asked of it, and the chance in
    that."""

    record: int
    task: str
    rng: np.random.Generator


class Schedule(Protocol):
    """The packed sequences of a stage. Several threads may ask.

    Attributes:
      num_unused: records that are in no sequence: they lack what the tasks need, or have more
        images than tiles.
    """

    num_unused: int

    def picks(self, index: int) -> list[Pick]:
        """Returns the records of a sequence."""

    def records(self, index: int) -> list[int]:
        """Returns their indexes alone."""

    def num_records(self, index: int) -> int:
        """Returns how many they are."""

    def counters(self, next_sequence: int) -> dict[str, float]:
        """Returns what the sequences before `next_sequence` held, for metrics."""

    def state(self) -> dict[str, Any]:
        """Returns what is known of sequences by having planned them, for a checkpoint: a dict for
        JSON."""

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Takes what `state` gave, so that epochs before are not planned again. Returns False of a
        state that is damaged, or of other data, another config or another way of planning."""


def make(
    data: DataConfig,
    sizes: Sequence[int],
    known: Lengths | None,
    seed: Sequence[int],
    num_sequences: int,
) -> Schedule:
    """Returns what stands in the `num_sequences` sequences of a stage.

    Args:
      data: which sources and tasks there are.
      sizes: how many records each of `data.folders` has.
      known: the lengths of the records where several are packed into a sequence, else None.
      seed: of all that is random.
      num_sequences: of the stage.

    Raises:
      NothingToDraw: no record is of use to any task.
    """
    if known is None and not data.sources:
        return Shuffled(data, sizes[0], seed)
    return Mixed(data, sizes, known, seed, num_sequences)


class Shuffled:
    """A fixed number of records a sequence, each of a folder's once an epoch."""

    num_unused = 0

    def __init__(self, data: DataConfig, size: int, seed: Sequence[int]):
        self._size = size
        self._each = data.records_per_sequence
        self._seed = seed
        shuffle_seed = int(np.random.default_rng(seed).integers(2**32))
        self.order = grain.MapDataset.range(size).shuffle(shuffle_seed).repeat()
        self._tasks, fractions = task_fractions(data.tasks)
        self._bounds = np.cumsum(fractions) / np.sum(fractions)

    def picks(self, index: int) -> list[Pick]:
        """See Schedule."""
        # Of the sequence's index alone: who builds it, and after which others, does not matter. Nor
        # does whether a record before can be read: each has a generator of its own.
        seeds = [[*self._seed, index, i][: None if i else -1] for i in range(self._each)]
        rngs = map(np.random.default_rng, seeds)
        records = self.records(index)
        return [Pick(one, self._task(rng), rng) for one, rng in zip(records, rngs, strict=True)]

    def _task(self, rng: np.random.Generator) -> str:
        # What rng.choice does with shares, without its checks, which take longer than the rest.
        return self._tasks[np.searchsorted(self._bounds, rng.random(), side="right")]

    def records(self, index: int) -> list[int]:
        """See Schedule."""
        return [self.order[index * self._each + i] for i in range(self._each)]

    def num_records(self, index: int) -> int:
        """See Schedule."""
        return self._each

    def counters(self, next_sequence: int) -> dict[str, float]:
        """See Schedule."""
        # Planned ones: those that do not fit are counted where they are left out.
        records = next_sequence * self._each
        return {"epoch": records / self._size, "records": records}

    def state(self) -> dict[str, Any]:
        """See Schedule."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """See Schedule."""
        return not state


class Told(NamedTuple):
    """What the sequences before one of them held, by source."""

    index: int
    records: np.ndarray  # int64 [sources]
    tokens: np.ndarray  # int64 [sources]
    tiles: int  # of all sources


class Mixed:
    """Records of a `Mixture`; where their lengths are known, as many a sequence as the plan puts
    into it.

    Where an epoch begins only the plans of those before it tell. Threads plan each in time.
    """

    def __init__(
        self,
        data: DataConfig,
        sizes: Sequence[int],
        known: Lengths | None,
        seed: Sequence[int],
        num_sequences: int,
    ):
        """For the arguments and errors see `make`."""
        self._mixture = Mixture(data, sizes, known, seed)
        self.num_unused = self._mixture.num_unused
        self._is_packed = known is not None
        self._seed = seed
        self._seq_len = data.seq_len
        self._max_tiles = data.max_tiles
        self._num_sequences = num_sequences
        self._lock = threading.Lock()
        # Of every epoch known so far; the last is the end of the last of them.
        self._begins = [0]
        self._epochs: collections.OrderedDict[int, Future[Epoch]] = collections.OrderedDict()
        self._told = self._told_nothing()

    def picks(self, index: int) -> list[Pick]:
        """See Schedule."""
        epoch = self.epoch_at(index)
        return [
            Pick(
                int(epoch.records[place]),
                self._mixture.tasks[epoch.tasks[place]],
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

        They grow over epochs; `packing_efficiency` is the fraction of all positions so far that
        were planned for tokens, and `tile_efficiency` that of the places for tiles which have one.
        """
        # Counted on from the place told last; asked of an earlier one, from the beginning.
        told = self._told if self._told.index <= next_sequence else self._told_nothing()
        while told.index < next_sequence:
            told = self._tell(told, next_sequence)
        self._told = index, records, tokens, tiles = told
        result = {"epoch": self._progress(index)} | self._by_source("records", records)
        if not self._is_packed:
            return result
        planned = max(index, 1)
        result |= self._by_source("tokens", tokens)
        result["packing_efficiency"] = float(tokens.sum() / (planned * self._seq_len))
        return result | {"tile_efficiency": tiles / (planned * self._max_tiles)}

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
            "tiles": told.tiles,
        }
        return values | {"digest": self._digest(values)}

    def restore(self, state: Mapping[str, Any]) -> bool:
        """See Schedule."""
        values = {name: value for name, value in state.items() if name != "digest"}
        # Versions before told no tiles: what they planned is planned again, and counted.
        if state.get("digest") != self._digest(values) or "tiles" not in values:
            return False
        with self._lock:
            # Begins are the same wherever they are known: the longer list holds the shorter.
            if len(values["begins"]) > len(self._begins):
                self._begins = list(values["begins"])
            records, tokens = (np.array(values[name], np.int64) for name in ("records", "tokens"))
            self._told = Told(values["row"], records, tokens, values["tiles"])
        return True

    def epoch_at(self, index: int) -> Epoch:
        """Returns the epoch that holds a sequence."""
        while True:
            with self._lock:
                # A sequence a record: no plan has to count them.
                while not self._is_packed and self._begins[-1] <= index:
                    self._begins.append(self._begins[-1] + sum(self._mixture.counts.values()))
                known = self._begins[-1] > index
                number = len(self._begins) - 1
                if known:
                    # Of begins 0, 10, 25 index 10 is in epoch 1.
                    number = bisect.bisect_right(self._begins, index) - 1
            epoch = self._epoch(number)
            if known:
                return epoch

    def _tell(self, told: Told, next_sequence: int) -> Told:
        """Adds the sequences up to `next_sequence` or the end of an epoch."""
        index, records, tokens, tiles = told
        # A whole epoch without lengths needs no plan: it takes of each source what it always does.
        whole = list(self._mixture.counts.values())
        size = sum(whole)
        if not self._is_packed and index % size == 0 and index + size <= next_sequence:
            return Told(index + size, records + whole, tokens, tiles)
        epoch = self.epoch_at(index)
        end = min(next_sequence, epoch.end)
        places = epoch.places(index, end)
        sources = np.searchsorted(self._mixture.starts, epoch.records[places], side="right") - 1
        records = records + np.bincount(sources, minlength=len(records))
        if epoch.tokens is not None:
            # As floats, bincount's weights, whole numbers are exact up to 2**53.
            added = np.bincount(sources, weights=epoch.tokens[places], minlength=len(tokens))
            tokens = tokens + added.astype(np.int64)
            tiles = tiles + self._mixture.count_tiles(epoch.records[places])
        return Told(end, records, tokens, tiles)

    def _progress(self, index: int) -> float:
        """Epochs in the sequences before number `index`."""
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
        # Waited for without the lock, which the planning thread takes before it is done.
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
            json.dumps([values, self._mixture.causes]).encode(), digest_size=8
        ).hexdigest()

    def _make(self, number: int) -> Epoch:
        begin = self._begins[number]
        if sum(self._mixture.counts.values()) < plan_file.MIN_RECORDS:
            return self._mixture.epoch(number, begin)
        # Named by what it follows from; where it begins is no part of the arrays.
        name = f"epoch-{self._digest({})}"
        outdated = f"{name}-{number - MAX_EPOCHS}"

        def make() -> dict[str, np.ndarray]:
            return self._mixture.epoch(number, begin).arrays()

        return Epoch.of(number, begin, plan_file.shared(f"{name}-{number}", make, outdated))

    def _told_nothing(self) -> Told:
        nothing = np.zeros(len(self._mixture.sources), np.int64)
        return Told(0, nothing, nothing, 0)

    def _by_source(self, name: str, counts: np.ndarray) -> dict[str, float]:
        return {
            f"{name}/{source}" if source else name: int(count)
            for source, count in zip(self._mixture.sources, counts, strict=True)
        }
