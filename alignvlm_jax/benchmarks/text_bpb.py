"""Bits per byte: how well a model's LLM, without an image, predicts held-out text.

The text of a record is encoded, after the LLM's begin-of-text token if it has one, and cut into
consecutive windows. Each window begins with the last token of the one before, which is given and
not predicted again: so every token but the first is predicted exactly once. The bits that the
predictions take, divided by the bytes of the text in UTF-8, do not depend on the tokenizer; the
longer the window, the fewer they are.
"""

import dataclasses
import functools
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignvlm_jax.benchmarks import predictions
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.benchmarks.tasks import TextTask
from alignvlm_jax.data import chat, index, loader, prepared, sequences, shards
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.tasks import transcription
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import batching, loading
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Float

SCORER_VERSION = "bits_per_byte/1"
"""Version of the measure, which stands in the header of the results.

Raise it when the value of any text changes.
"""

BATCH_TOKENS = 4096
"""Tokens of a batch on each data-parallel device.

They are enough to keep a large device busy, and take seconds on a small one.
"""


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a record.

    Attributes:
      id: id of the record.
      record: index of the record in its split.
      kind: source of the record.
      text: its text; "" if it has none.
    """

    id: str
    record: int
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A task with its texts, which were read from `directory`."""

    task: TextTask
    directory: Path
    texts: tuple[Text, ...]


def open_text(task: TextTask, data: Path, count: int | None) -> HeldOut:
    """Returns a task with the texts of its records.

    Args:
      task: the task.
      data: folder of all benchmarks.
      count: the number of records, spread evenly over the split; None takes all.

    Raises:
      UserError: the task's folder or its split is not there, or no record has text.
    """
    directory = data / (task.folder or task.name)
    records = shards.RecordSource(directory, task.split)
    count = len(records) if count is None else min(count, len(records))
    chosen = (
        (number, records[number]) for number in (i * len(records) // count for i in range(count))
    )
    texts = tuple(
        Text(record.id, number, record.source, text_of(record)) for number, record in chosen
    )
    if not any(text.text for text in texts):
        raise UserError(f"split {task.split!r} in {directory}: none of {count:,} records has text")
    return HeldOut(task, directory, texts)


def text_of(record: Record) -> str:
    """Returns the transcription of a record, or "" if it has none but white space.

    For a record without images it is the questions and their first answers, each on a line.
    """
    if record.lines or record.images:
        text = transcription(record)
    else:
        texts = (part for turn in record.turns for part in (turn.question, *turn.answers[:1]))
        text = "\n".join(part for part in texts if part)
    return text if text.strip() else ""


def windows(tokens: np.ndarray, length: int) -> list[np.ndarray]:
    """Returns windows of at most `length` tokens that overlap by one token.

    In each, all tokens but the first are predicted: so every token but the very first is predicted
    exactly once.

    Args:
      tokens: int32 [n].
      length: the largest number of tokens of a window, at least 2.
    """
    # 7 tokens in windows of 4: 0 to 3 and 3 to 6.
    return [tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1)]


class Reader:
    """A measurement of the bits per byte of texts under one model."""

    def __init__(self, loaded: Loaded):
        self._loaded = loaded
        self._nll = jax.jit(
            functools.partial(_nll, loaded.model), out_shardings=sharding.replicated(loaded.mesh)
        )

    def measure(self, held_out: HeldOut) -> Predictions:
        """Returns a row for each text, with the score (bits, bytes); writes them to the workdir.

        Results that this checkpoint has made in the same way before are reused. A row without text
        has a `problem` instead of a score.
        """
        header = self._header(held_out)
        path = predictions.task_path(loading.workdir_of(self._loaded.path), held_out.task.name)
        name = held_out.task.name
        texts = held_out.texts
        window = header["window"]
        size = self._batch_size(len(texts), window)

        # Resumes behind the `done` texts that an earlier process has measured.
        def measured(done: int) -> Iterator[list[dict[str, Any]]]:
            return self._measured(texts[done:], window, size)

        return predictions.collect(
            path, header, measured, name=name, count=len(texts), things="texts"
        )

    def _measured(
        self, texts: Sequence[Text], window: int, size: int
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields the rows of texts, those together that a batch of `size` windows finished."""
        nats = np.zeros(len(texts))
        finished = 0
        for batch in _batches(self._windows(texts, window), size):
            owners = [owner for owner, _ in batch]
            # np.add.at, not `nats[owners] +=`, which counts a repeated owner only once.
            np.add.at(nats, owners, self._nats([row for _, row in batch], size))
            # The last text of a batch may have more windows in the next: it is not finished.
            last = owners[-1]
            yield [_row(texts[i], nats[i]) for i in range(finished, last)]
            finished = last
        yield [_row(texts[i], nats[i]) for i in range(finished, len(texts))]

    def _windows(self, texts: Sequence[Text], window: int) -> Iterator[tuple[int, PackedSequence]]:
        """Yields the windows of all texts as packed sequences, each with the number of its text."""
        tokenizer = self._loaded.tokenizer
        begin = chat.begin_ids(tokenizer)
        for number, text in enumerate(texts):
            tokens = np.array(begin + tokenizer.encode(text.text), np.int32)
            for part in windows(tokens, window):
                yield number, sequences.build_text(part, window, tokenizer)

    def _nats(self, batch: Sequence[PackedSequence], size: int) -> np.ndarray:
        """Returns the negative log-likelihood of each of n rows in nats, float64 [n]."""
        # The last row is repeated up to `size` rows, since a batch of another shape would compile
        # anew; what the repetitions give is cut off below.
        local_rows = sharding.rows_of_process(self._loaded.mesh, size)
        arrays = loader.stack([batch[min(row, len(batch) - 1)] for row in local_rows.tolist()])
        weights = np.stack([row["loss_weights"] for row in batch])
        with mesh_lib.use(self._loaded.mesh):
            nll = np.asarray(
                self._nll(self._loaded.variables, sharding.put_batch(arrays, self._loaded.mesh))
            )
        # [n, T]; weights are 0 for the first token and for padding. Long texts add up many small
        # numbers, hence float64.
        return (nll[: len(batch)] * weights).sum(-1, dtype=np.float64)

    def _batch_size(self, count: int, window: int) -> int:
        """Returns the number of rows of a batch, for `count` texts of a window or more each."""
        # Whole rows for each device, one at least if a window is longer than BATCH_TOKENS.
        data_parallel_size = self._loaded.data_parallel_size
        return batching.batch_size(
            count, data_parallel_size * max(BATCH_TOKENS // window, 1), data_parallel_size
        )

    def _header(self, held_out: HeldOut) -> dict[str, Any]:
        """Returns the header of the results: everything that the values depend on."""
        task = held_out.task
        loaded = self._loaded
        config = loaded.config
        # Published weights know longer texts than a stage of short prompts shows them.
        longest = config.longest_context or config.data.seq_len
        read = json.dumps([(text.id, text.text) for text in held_out.texts])
        return {
            "run": config.name,
            "run_id": config.run_id,
            "checkpoint": str(loaded.path),
            "step": loaded.step,
            # To the microsecond: it tells two runs apart that were written to the same workdir.
            "train_seconds": loaded.metadata["train_seconds"],
            "tokenizer": index.fingerprint_of(loaded.tokenizer),
            "window": min(task.window, longest),
            "scorer_version": SCORER_VERSION,
            "task": task.name,
            "split": task.split,
            "data": prepared.fingerprint(held_out.directory),
            "num_texts": len(held_out.texts),
            "texts_crc32": zlib.crc32(read.encode()),
        }


def _nll(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B T"]:
    """Returns the negative log-likelihood of each token in nats."""
    return model.apply(variables, batch, method="losses").tokens.nll


def _row(text: Text, nats: float) -> dict[str, Any]:
    """Returns the row of a text, whose score is (bits, bytes)."""
    row = {"id": text.id, "record": text.record, "kind": text.kind}
    if not text.text:
        return row | {"scores": {}, "problem": f"record {text.id} has no text"}
    return row | {"scores": {TextTask.score: [float(nats) / math.log(2), len(text.text.encode())]}}


def _batches(
    items: Iterable[tuple[int, PackedSequence]], size: int
) -> Iterator[list[tuple[int, PackedSequence]]]:
    """Yields lists of `size` items; the last one may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
