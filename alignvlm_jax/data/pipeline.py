"""Batches. Row i of a stage is a pure function of (seed, stage, i), so a position in the data is one number."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np

from alignvlm_jax.config import Config
from alignvlm_jax.data import rows, tokenizer_files
from alignvlm_jax.data.rows import Row
from alignvlm_jax.data.schema import Batch
from alignvlm_jax.data.sources import RecordSource
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError, nearest


class TrainRows:
    """All rows of a stage, by global index: epoch by epoch through the records, each epoch in its own order."""

    def __init__(self, config: Config, split: str):
        self._config = config
        self._tokenizer = load_tokenizer(config)
        self._records = RecordSource(config.data.dir, split)
        self._seed = [config.seed, zlib.crc32(f"{config.stage}/{split}".encode())]
        shuffle_seed = int(np.random.default_rng(self._seed).integers(2**32))
        self._order = grain.MapDataset.range(len(self._records)).shuffle(shuffle_seed).repeat()
        # Sorted: the order of the config's mapping must not decide which record gets which task.
        self._tasks = sorted(config.data.tasks)
        for task in self._tasks:
            if task not in rows.TASKS:
                raise UserError(f"unknown task {task!r} in config.data.tasks{nearest(task, rows.TASKS)}")
        weights = np.array([config.data.tasks[task] for task in self._tasks])
        self._task_weights = weights / weights.sum()

    def __len__(self) -> int:
        return self._config.train.num_steps * self._config.train.batch_size

    def __getitem__(self, index: int) -> Row:
        rng = np.random.default_rng([*self._seed, index])
        task = self._tasks[rng.choice(len(self._tasks), p=self._task_weights)]
        return rows.build_row(self._records[self._order[index]], task, rng, self._config, self._tokenizer)


class TrainBatches(Iterator[Batch]):
    """This process's share of a stage's batches, from `start_row` (a global count of rows) to the stage's end.

    Attributes:
      next_row: global rows handed out so far: what a checkpoint has to hold.
    """

    def __init__(self, config: Config, *, start_row: int = 0, process_index: int = 0, process_count: int = 1):
        global_size = config.train.batch_size
        if global_size % process_count:
            raise UserError(f"config.train.batch_size {global_size} is not a multiple of {process_count} processes")
        if start_row % global_size:
            raise UserError(f"data position {start_row} is not a multiple of config.train.batch_size {global_size}")
        local_size = global_size // process_count
        all_rows = TrainRows(config, config.data.split)
        local_rows = _Block(all_rows, start_row, global_size, process_index * local_size, local_size)
        options = grain.ReadOptions(num_threads=config.data.num_threads, prefetch_buffer_size=config.data.prefetch)
        # Batched before the threads' buffer: whole batches wait in it, and nothing is stacked while a step waits.
        self._batches = iter(grain.MapDataset.source(local_rows).batch(local_size).to_iter_dataset(options))
        self._global_size = global_size
        self._max_unsupervised = config.data.max_unsupervised
        self._num_rows = self._num_unsupervised = 0
        self.next_row = start_row

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._count_unsupervised(batch)
        self.next_row += self._global_size
        return batch

    def _count_unsupervised(self, batch: Batch) -> None:
        supervised = batch["loss_weights"].any(axis=1)
        self._num_rows += len(supervised)
        self._num_unsupervised += int((~supervised).sum())
        # At the start of a run one bad row would be a large share: no share is taken of less than 100 rows.
        if self._num_unsupervised > self._max_unsupervised * max(self._num_rows, 100):
            raise UserError(
                f"{self._num_unsupervised} of {self._num_rows} rows have no answer that fits config.data.row_length; "
                f"config.data.max_unsupervised is {self._max_unsupervised}"
            )


class _Block:
    """The rows of one process: a contiguous block of every global batch, whatever the number of processes."""

    def __init__(self, all_rows: TrainRows, start_row: int, global_size: int, offset: int, local_size: int):
        self._rows = all_rows
        self._start, self._global_size, self._offset, self._local_size = start_row, global_size, offset, local_size

    def __len__(self) -> int:
        return (len(self._rows) - self._start) // self._global_size * self._local_size

    def __getitem__(self, index: int) -> Row:
        batch, row = divmod(index, self._local_size)
        return self._rows[self._start + batch * self._global_size + self._offset + row]


def validation_batches(config: Config, batch_size: int, num_rows: int) -> list[Batch]:
    """Returns the first `num_rows` rows of the validation split, the same ones at every call. `num_rows` is rounded
    down to whole batches, but to no less than one."""
    validation = TrainRows(config, config.data.validation_split)
    return [
        stack([validation[start + i] for i in range(batch_size)])
        for start in range(0, max(1, num_rows // batch_size) * batch_size, batch_size)
    ]


def stack(batch_rows: list[Row]) -> Batch:
    """Stacks rows to a batch."""
    return Batch(**{name: np.stack([row[name] for row in batch_rows]) for name in batch_rows[0]})


def load_tokenizer(config: Config) -> Tokenizer:
    """Reads the tokenizer of `data.tokenizer`, or that of `data.dir`.

    Raises:
      UserError: it has more tokens than `model.llm.vocab_size`, or takes the model's image token for text.
    """
    path = tokenizer_path(config)
    tokenizer = tokenizer_files.load(path)
    if tokenizer.vocab_size > config.model.llm.vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} tokens, config.model.llm.vocab_size is "
            f"{config.model.llm.vocab_size}; make it at least {tokenizer.vocab_size}"
        )
    image_id = config.model.image_token_id
    own_image_id = tokenizer.specials.get("<image>", image_id)
    if image_id != own_image_id:
        raise UserError(
            f"tokenizer {path} marks image slots by token {own_image_id}, config.model.image_token_id is {image_id}; "
            "make them equal"
        )
    if tokenizer.is_text(image_id):
        raise UserError(
            f"config.model.image_token_id {image_id} is {tokenizer.piece(image_id)!r} in tokenizer {path}; take one "
            f"that no text makes, as {tokenizer.vocab_size}"
        )
    return tokenizer


def tokenizer_path(config: Config) -> Path:
    """Returns the file or folder of the tokenizer."""
    return Path(config.data.tokenizer or config.data.dir)
