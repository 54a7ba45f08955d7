"""Batches.

Row i of a stage is a pure function of (seed, stage, i), so a position in the data is one number.
"""

import bisect
import dataclasses
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from alignvlm_jax import storage
from alignvlm_jax.config import Config, SourceConfig
from alignvlm_jax.data import chat, examples, sampler, tokenizers
from alignvlm_jax.data.examples import Part, Row
from alignvlm_jax.data.record import Batch, Record
from alignvlm_jax.data.sampler import Schedule
from alignvlm_jax.data.shards import RecordSource, shard_names
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError, nearest

RECORDS = 128
"""On their way: twice as many as there are requests at a time."""
KEPT = 64 * RECORDS
"""Rows that were asked for: dicts keep their order, so that those read long ago are forgotten."""


class Rows(Protocol):
    """Rows whose records can be asked for before they are needed."""

    def prefetch(self, index: int) -> int:
        """Begins to read the records of a row; returns how many there are."""


class ReadAhead:
    """Asks for the records of rows once each, `RECORDS` before the row that is read. Several
    threads may read, each at another place."""

    def __init__(self, rows: Rows, num_rows: int, row: Callable[[int], int]):
        """`row` is the place among all rows of number `i` of the `num_rows` that are read."""
        self._rows = rows
        self._num_rows = num_rows
        self._row = row
        self._lock = threading.Lock()
        self._asked: dict[int, int] = {}

    def go_on(self, index: int) -> None:
        """Asks for what comes after number `index`, which is read now."""
        coming = 0
        while coming < RECORDS and index < self._num_rows:
            with self._lock:
                count = self._asked.setdefault(index, 0)
            if not count:
                count = self._rows.prefetch(self._row(index))
                with self._lock:
                    self._asked[index] = count
            coming += count
            index += 1
        with self._lock:
            while len(self._asked) > KEPT:
                del self._asked[next(iter(self._asked))]


class TrainRows:
    """All rows of a stage, by global index.

    Attributes:
      tokenizer: of their text.
      schedule: says what stands in each.
      problem: why the first record was left out that could not be read, or did not fit; None while
        there is none.
    """

    def __init__(self, config: Config, split: str):
        self._config = config
        self.tokenizer = load_tokenizer(config)
        for task in config.data.tasks:
            if task not in examples.TASKS:
                raise UserError(
                    f"unknown task {task!r} in config.data.tasks{nearest(task, examples.TASKS)}"
                )
        self._sources = [RecordSource(folder, split) for folder in config.data.folders]
        sizes = [len(source) for source in self._sources]
        self._starts = np.cumsum([0, *sizes]).tolist()
        seed = [config.seed, zlib.crc32(f"{config.stage}/{split}".encode())]
        self.schedule: Schedule = sampler.make(config, split, sizes, seed, tokenizer_path(config))
        self.problem: str | None = None
        self.is_remote = any(source.is_remote for source in self._sources)

    def __len__(self) -> int:
        return self._config.train.num_steps * self._config.train.batch_size

    def __getitem__(self, index: int) -> Row:
        return examples.join([part for _, part in self.parts(index)], self._config, self.tokenizer)

    def parts(self, index: int) -> list[tuple[str, Part]]:
        """Returns the records' ids and what each brings into a row. A record that cannot be read,
        or has no answer that fits, is left out; the others are what they would be."""
        parts: list[tuple[str, Part]] = []
        for pick in self.schedule.picks(index):
            try:
                record = self._record(pick.record)
                part = examples.build_part(
                    record, pick.task, pick.rng, self._config, self.tokenizer
                )
                self._check_fits(record, [*(part for _, part in parts), part])
            except UserError as err:
                self.problem = self.problem or str(err)
            else:
                parts.append((record.id, part))
        return parts

    def prefetch(self, index: int) -> int:
        """Begins to read the records of a row from a bucket; returns how many there are."""
        records = self.schedule.records(index)
        for record in records:
            source = bisect.bisect_right(self._starts, record) - 1
            self._sources[source].prefetch(record - self._starts[source])
        return len(records)

    def _check_fits(self, record: Record, parts: list[Part]) -> None:
        """It does, unless the index from which the row was planned is wrong."""
        data = self._config.data
        num_tokens = sum(len(part.tokens) for part in parts)
        num_tiles = sum(len(part.tile_arrays["tiles"]) for part in parts)
        if num_tokens > data.row_length or num_tiles > data.max_tiles:
            raise UserError(
                f"record {record.id} takes more of a row than its index says; `prepare --recount` "
                "mends it"
            )

    def _record(self, index: int) -> Record:
        source = bisect.bisect_right(self._starts, index) - 1
        return self._sources[source][index - self._starts[source]]


class TrainBatches(Iterator[Batch]):
    """A process's rows of a stage's batches, from `start_row` (a global count of rows) to the
    stage's end.

    Attributes:
      next_row: global rows handed out so far.
      num_unused: records that are in no row; see `sampler.Schedule`.
      num_unsupervised: records that this process handed out since `start_row` and that taught
        nothing: they could not be read, or had no answer that fits.
    """

    def __init__(
        self,
        config: Config,
        *,
        start_row: int = 0,
        local_rows: Sequence[int] | None = None,
        schedule_state: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          start_row: global rows of the stage that have been trained on.
          local_rows: those of each global batch that this process feeds, ascending; by default all
            of them.
          schedule_state: what `schedule_state` gave there. Without it, or where it is of other
            data, the epochs before are planned again to know where this one begins.
        """
        global_size = config.train.batch_size
        if start_row % global_size:
            raise UserError(
                f"data position {start_row} is not a multiple of config.train.batch_size "
                f"{global_size}"
            )
        self._rows = TrainRows(config, config.data.split)
        self._rows.schedule.restore(schedule_state or {})
        # Plans the epochs so far in their order; any other would plan some of them twice.
        self.counters(start_row)
        self._local_rows = list(range(global_size) if local_rows is None else local_rows)
        self._batches = _read_ahead(
            self._rows, range(start_row, len(self._rows), global_size), self._local_rows, config
        )
        self._global_size = global_size
        self.next_row = start_row
        self._max_unsupervised = config.data.max_unsupervised
        self._num_records = self.num_unsupervised = 0
        self.num_unused = self._rows.schedule.num_unused

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._count_unsupervised(batch)
        self.next_row += self._global_size
        return batch

    def counters(self, next_row: int) -> dict[str, float]:
        """Returns what all processes had in the rows before `next_row`; see `sampler.Schedule`. It
        follows from the config, so that a run that was stopped counts as one that was not."""
        return self._rows.schedule.counters(next_row)

    def schedule_state(self) -> dict[str, Any]:
        """Returns what spares a resumed run the planning of epochs that are over: a dict for
        JSON."""
        return self._rows.schedule.state()

    def _count_unsupervised(self, batch: Batch) -> None:
        planned = sum(
            self._rows.schedule.num_records(self.next_row + row) for row in self._local_rows
        )
        self._num_records += planned
        self.num_unsupervised += planned - count_supervised(batch)
        # At the start of a run one bad record would be a large share: no share is taken of less
        # than 100.
        if self.num_unsupervised > self._max_unsupervised * max(self._num_records, 100):
            raise UserError(
                f"{self.num_unsupervised} of {self._num_records} records cannot be read or have "
                "no answer that fits config.data.row_length; config.data.max_unsupervised is "
                f"{self._max_unsupervised}"
                + (f"; the first: {self._rows.problem}" if self._rows.problem else "")
            )


def count_supervised(batch: Batch) -> int:
    """Returns how many records of a batch have a token with loss."""
    row, column = np.nonzero(batch["loss_weights"])
    size, length = batch["segment_ids"].shape
    is_supervised = np.zeros((size, length + 1), bool)
    is_supervised[row, batch["segment_ids"][row, column]] = True
    return int(is_supervised.sum())


class _LocalRows:
    """A process's rows of batches that begin at `starts`, batch after batch."""

    def __init__(self, all_rows: TrainRows, starts: Sequence[int], local_rows: Sequence[int]):
        self._rows = all_rows
        self._starts = starts
        self._local_rows = local_rows
        self._ahead = ReadAhead(all_rows, len(self), self._row) if all_rows.is_remote else None

    def __len__(self) -> int:
        return len(self._starts) * len(self._local_rows)

    def __getitem__(self, index: int) -> Row:
        if self._ahead:
            self._ahead.go_on(index)
        return self._rows[self._row(index)]

    def _row(self, index: int) -> int:
        batch, place = divmod(index, len(self._local_rows))
        return self._starts[batch] + self._local_rows[place]


def _read_ahead(
    all_rows: TrainRows, starts: Sequence[int], local_rows: Sequence[int], config: Config
) -> Iterator[Batch]:
    """The batches that begin at `starts`, of the local rows alone, made by the config's reading
    threads."""
    options = grain.ReadOptions(
        num_threads=config.data.num_threads, prefetch_buffer_size=config.data.prefetch
    )
    rows_here = grain.MapDataset.source(_LocalRows(all_rows, starts, local_rows))
    # Batched before the threads' buffer: whole batches wait in it, and nothing is stacked while a
    # step waits.
    return iter(rows_here.batch(len(local_rows)).to_iter_dataset(options))


def by_source(config: Config) -> dict[str, Config]:
    """Returns the config of validation on each source, by its name, or "" where there is but
    `data.dir`. Sources without the split are left out, as of a small one nothing may have been held
    out, and those of no use to the stage's tasks; all patches count as labelled.

    Raises:
      UserError: no source has the split, none is of use, or one cannot be read.
    """
    data = dataclasses.replace(config.data, labelled_share=1.0)
    split = config.data.validation_split
    folders = {name: source.dir for name, source in data.sources.items()} or {"": data.dir}
    held = {name: folder for name, folder in folders.items() if shard_names(folder, split)}
    if not held:
        raise UserError(f"there are no shards of split {split!r} in {', '.join(folders.values())}")
    useful: dict[str, Config] = {}
    problem: UserError | None = None
    for name, folder in held.items():
        # Whatever its share of training is, all of it counts here.
        alone = dataclasses.replace(data, sources={name: SourceConfig(dir=folder)} if name else {})
        validated = dataclasses.replace(config, data=alone)
        try:
            TrainRows(validated, split)
        except sampler.NothingToDraw as err:
            problem = problem or err
        else:
            useful[name] = validated
    if not useful:
        raise problem
    return useful


class ValidationBatches:
    """A process's rows of the batches of the validation split, the same ones at every pass, read
    anew in each: kept, those of the paper's stages would take gigabytes of every host."""

    def __init__(
        self,
        config: Config,
        batch_size: int,
        num_rows: int,
        local_rows: Sequence[int] | None = None,
        gather: Callable[[str | None], list[str | None]] = lambda problem: [problem],
    ):
        """
        Args:
          batch_size: rows of a global batch.
          num_rows: of all processes; rounded down to whole batches, but to no less than one.
          local_rows: as of `TrainBatches`.
          gather: gives what all processes pass to it; by default there is one. One of hundreds may
            have a single row, and that be damaged.

        Raises:
          UserError: no record of any process's rows can be read.
        """
        self._config = config
        self._rows = TrainRows(config, config.data.validation_split)
        self._starts = range(0, max(1, num_rows // batch_size) * batch_size, batch_size)
        self._local_rows = list(range(batch_size) if local_rows is None else local_rows)
        self._check(gather)

    def __iter__(self) -> Iterator[Batch]:
        return _read_ahead(self._rows, self._starts, self._local_rows, self._config)

    def _check(self, gather: Callable[[str | None], list[str | None]]) -> None:
        """Mostly reads one row."""
        here = _LocalRows(self._rows, self._starts, self._local_rows)
        is_useful = any(here[i]["loss_weights"].any() for i in range(len(here)))
        problems = gather(None if is_useful else self._rows.problem)
        if all(problems):
            raise UserError(
                f"nothing to validate on in split {self._config.data.validation_split!r}: "
                f"{problems[0]}"
            )


def stack(batch_rows: list[Row]) -> Batch:
    """Stacks rows to a batch."""
    return Batch(**{name: np.stack([row[name] for row in batch_rows]) for name in batch_rows[0]})


def tokenizer_contents(config: Config) -> str:
    """Returns what tells one tokenizer from another, its chat format included, in words.

    Raises:
      UserError: it is missing.
    """
    path, content = tokenizers.read(tokenizer_path(config))
    content += chat.format_file(tokenizers.load(path)).encode()
    return f"{len(content):,} bytes, checksum {zlib.crc32(content):08x}"


def load_tokenizer(config: Config) -> Tokenizer:
    """Reads the tokenizer of `data.tokenizer`, or that of `data.dir`.

    Raises:
      UserError: it has more tokens than `model.llm.vocab_size`, or takes the model's image token
        for text.
    """
    path = tokenizer_path(config)
    tokenizer = tokenizers.load(path)
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, config.model.llm.vocab_size is "
            f"{config.model.llm.vocab_size}; make it at least {tokenizer.vocab_size}"
        )
    image_id = config.model.image_token_id
    own_image_id = tokenizer.specials.get("<image>", image_id)
    if image_id != own_image_id:
        raise UserError(
            f"tokenizer {path} marks image slots by token {own_image_id}, "
            f"config.model.image_token_id is {image_id}; make them equal"
        )
    if tokenizer.is_text(image_id):
        raise UserError(
            f"config.model.image_token_id {image_id} is {tokenizer.piece(image_id)!r} in "
            f"tokenizer {path}; take one that no text makes, as {tokenizer.vocab_size}"
        )
    return tokenizer


def tokenizer_path(config: Config) -> Path:
    """Returns the file or folder of the tokenizer."""
    return storage.path(config.data.tokenizer or config.data.dir)
