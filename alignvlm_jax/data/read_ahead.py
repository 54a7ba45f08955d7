"""Batches of packed sequences, made by threads before they are needed; records of a bucket are
requested earlier still."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grain

from alignvlm_jax.config import DataConfig
from alignvlm_jax.data.record import Batch
from alignvlm_jax.data.sequences import PackedSequence

RECORDS = 128
"""Requested and not used yet: twice as many as there are requests at a time."""
KEPT = 64 * RECORDS
"""Sequences that were requested: dicts keep their order, so that those read long ago are
forgotten."""


class Sequences(Protocol):
    """Packed sequences by index. Several threads may read.

    Attributes:
      is_remote: whether records come from a bucket.
    """

    is_remote: bool

    def __getitem__(self, index: int) -> PackedSequence:
        """Returns one of them."""

    def prefetch(self, index: int) -> int:
        """Begins to read the records of a sequence; returns how many there are."""


class ReadAhead:
    """Asks for the records of sequences once each, `RECORDS` before the sequence that is read.
    Several threads may read, each at another place."""

    def __init__(self, sequences: Sequences, num_sequences: int, index_of: Callable[[int], int]):
        """`index_of` gives the index among all sequences of number `i` of the `num_sequences` that
        are read."""
        self._sequences = sequences
        self._num_sequences = num_sequences
        self._index_of = index_of
        self._lock = threading.Lock()
        self._requested: dict[int, int] = {}

    def go_on(self, number: int) -> None:
        """Asks for what comes after a number, which is read now."""
        coming = 0
        while coming < RECORDS and number < self._num_sequences:
            # Entered as 0 before it is asked for: meanwhile another thread may ask a second time,
            # which the record source knows to be the same request.
            with self._lock:
                count = self._requested.setdefault(number, 0)
            if not count:
                count = self._sequences.prefetch(self._index_of(number))
                with self._lock:
                    self._requested[number] = count
            coming += count
            number += 1
        with self._lock:
            while len(self._requested) > KEPT:
                del self._requested[next(iter(self._requested))]


class LocalSequences:
    """The packed sequences that a process feeds, batch after batch.

    Of global batches that begin at `starts`, it feeds those at the places `local_rows`.
    """

    def __init__(self, sequences: Sequences, starts: Sequence[int], local_rows: Sequence[int]):
        self._sequences = sequences
        self._starts = starts
        self._local_rows = local_rows
        self._ahead = (
            ReadAhead(sequences, len(self), self._index_of) if sequences.is_remote else None
        )

    def __len__(self) -> int:
        return len(self._starts) * len(self._local_rows)

    def __getitem__(self, number: int) -> PackedSequence:
        if self._ahead:
            self._ahead.go_on(number)
        return self._sequences[self._index_of(number)]

    def _index_of(self, number: int) -> int:
        # Rows 2 and 3 of batches that begin at 0 and 8 are the sequences 2, 3, 10, 11.
        batch, place = divmod(number, len(self._local_rows))
        return self._starts[batch] + self._local_rows[place]


def batches(
    sequences: Sequences, starts: Sequence[int], local_rows: Sequence[int], data: DataConfig
) -> Iterator[Batch]:
    """Returns the batches that begin at `starts`, of the local rows alone, made by
    `data.num_threads` threads; `data.prefetch` of them wait."""
    options = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=data.prefetch)
    here = grain.MapDataset.source(LocalSequences(sequences, starts, local_rows))
    # Batched before the threads' buffer: whole batches wait in it, and nothing is stacked while a
    # step waits.
    return iter(here.batch(len(local_rows)).to_iter_dataset(options))
