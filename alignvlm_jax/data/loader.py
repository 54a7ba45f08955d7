"""The packed sequences of a stage, and its batches.

Sequence i of a stage is a pure function of (seed, stage, i), so a position in the data is one
number.
"""

import bisect
import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from alignvlm_jax.config import Config, ModelConfig
from alignvlm_jax.data import lengths, mixture, read_ahead, sampler
from alignvlm_jax.data.examples import ExampleBuilder, Segment
from alignvlm_jax.data.mixture import NothingToDraw
from alignvlm_jax.data.record import Batch, Record
from alignvlm_jax.data.sampler import Schedule
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.data.tasks import TASKS
from alignvlm_jax.errors import UserError, nearest, stage_flag

NUM_TRIED = 16
"""Sequences whose records are looked at before a stage that needs words."""
NUM_RECORDS_TOLERANCE = 0.01
"""Fraction by which the records of a stage's steps may differ from `train.num_records`."""


class TrainSequences:
    """All packed sequences of a stage, by global index.

    Attributes:
      builder: makes them.
      schedule: says what stands in each.
      is_remote: whether any records come from a bucket.
      problem: why the first record was left out that could not be read, or did not fit; None while
        there is none.
    """

    def __init__(self, config: Config, split: str, opened: StageData | None = None):
        """
        Args:
          config: of the stage.
          split: whose records they are.
          opened: what the stage has open already; by default that is opened here.

        Raises:
          UserError: the tokenizer does not fit the model, a task is unknown, a folder or its index
            is missing or damaged, or no record is of use to any task (`mixture.NothingToDraw`).
        """
        data = config.data
        opened = opened or StageData.open(data, config.model)
        for task in data.tasks:
            if task not in TASKS:
                raise UserError(f"unknown task {task!r} in config.data.tasks{nearest(task, TASKS)}")
        self.builder = ExampleBuilder.of(config, opened.tokenizer)
        self._stage = config.stage
        self._split = split
        self._opened = opened
        self._sources = [opened.records(folder, split) for folder in data.folders]
        self._train = config.train
        self._num_sequences = config.train.num_steps * config.train.batch_size
        sizes = [len(source) for source in self._sources]
        # Records are numbered over all sources: of the first from starts[0] on, and so on.
        self._starts = np.cumsum([0, *sizes]).tolist()
        known = None
        if data.packing == "offline":
            tasks, _ = mixture.task_fractions(data.tasks)
            limits = lengths.Limits.of(data, config.model.vision, config.tokens_per_tile)
            known = lengths.load(opened, data.folders, split, tasks, sizes, limits)
        # With the stage and the split: stages of one seed see their records in orders of their own.
        seed = [config.seed, zlib.crc32(f"{config.stage}/{split}".encode())]
        try:
            self.schedule: Schedule = sampler.make(data, sizes, known, seed, self._num_sequences)
        except NothingToDraw as err:
            raise NothingToDraw(f"{err}{self.remedy()}") from err
        self.problem: str | None = None
        self.is_remote = any(source.is_remote for source in self._sources)

    def __len__(self) -> int:
        return self._num_sequences

    @property
    def num_records(self) -> int:
        """Records of the split, of all sources."""
        return self._starts[-1]

    def __getitem__(self, index: int) -> PackedSequence:
        return self.builder.join([segment for _, segment in self.segments(index)])

    def segments(self, index: int) -> list[tuple[str, Segment]]:
        """Returns the records' ids and what each brings into a sequence. A record that cannot be
        read, or has no answer that fits, is left out; the others are what they would be."""
        segments: list[tuple[str, Segment]] = []
        for pick in self.schedule.picks(index):
            try:
                record = self._record(pick.record)
                segment = self.builder.segment(record, pick.task, pick.rng)
                self._check_fits(record, [*(segment for _, segment in segments), segment])
            except UserError as err:
                self.problem = self.problem or str(err)
            else:
                segments.append((record.id, segment))
                kept = segment.tile_arrays.get("kept_patches")
                # No config tells how many there are of a page whose blank patches have none.
                if kept is not None and not segment.loss_weights.any():
                    self.problem = self.problem or (
                        f"record {record.id} has no answer that fits beside its {kept.sum():,} "
                        "image tokens"
                    )
        return segments

    def check_words(self) -> None:
        """Raises UserError where the stage needs words and none of the first records knows those of
        its images."""
        if not self.builder.needs_words:
            return
        if any(record.lines for record in self.first_records()):
            return
        raise UserError(
            f"stage {self._stage!r} learns from the words of pages and their boxes "
            f"(config.train.visual_source is {self._train.visual_source!r}, answer_weight "
            f"{self._train.answer_weight:g}), and none of its first records in "
            f"{', '.join(self.builder.data.folders)} knows any"
        )

    def first_records(self) -> Iterator[Record]:
        """Yields the records of the first sequences, without those that cannot be read: the stage
        says itself how many these are."""
        for index in range(min(len(self), NUM_TRIED)):
            for record in self.schedule.records(index):
                with contextlib.suppress(UserError):
                    yield self._record(record)

    def lacks_text(self) -> bool:
        """Whether an index says that no record has text for any of the tasks."""
        counts = self._records_with_text()
        return bool(counts) and not any(counts[task] for task in self._tasks())

    def about_text(self) -> str:
        """Returns how many records an index says have text for the tasks, where not all have."""
        counts = self._records_with_text()
        total = self._starts[-1]
        lacking = [task for task in self._tasks() if counts.get(task, total) < total]
        if not lacking:
            return ""
        parts = ", ".join(f"{counts[task]:,} of {total:,} for {task}" for task in lacking)
        return f"; by the index, text have {parts}, and packing offline leaves the others out"

    def about_packing(self) -> str:
        """Returns how the first epoch is packed, and where the stage's steps do not hold
        `train.num_records`, how many would; nothing without offline packing. That epoch is planned
        for it: seconds, where it has millions of records."""
        if self.builder.data.packing != "offline":
            return ""
        train = self._train
        epoch = self.schedule.epoch_at(0)
        counters = self.schedule.counters(epoch.end)
        each = len(epoch.records) / epoch.end
        held = round(self._num_sequences * each)
        wanted = train.num_records
        about = (
            f"stage {self._stage!r}: {each:.2f} records a packed sequence, "
            f"{counters['packing_efficiency']:.1%} of its tokens and "
            f"{counters['tile_efficiency']:.1%} of its tiles used; {train.num_steps:,} steps of "
            f"{train.batch_size} hold {held:,} records, {held / len(epoch.records):.2f} epochs"
        )
        if not wanted or abs(held / wanted - 1) <= NUM_RECORDS_TOLERANCE:
            return about
        steps = math.ceil(wanted / (train.batch_size * each))
        return (
            f"{about}; for config.train.num_records {wanted:,}: "
            f"{stage_flag(self._stage, 'train.num_steps')}={steps}"
        )

    def remedy(self) -> str:
        """Returns what to type where records lack text for a task but not for all others."""
        counts = self._records_with_text()
        missing = [task for task in self._tasks() if not counts.get(task)]
        others = [task for task in ("transcribe", "answer") if counts.get(task)]
        if not missing or not others:
            return ""
        flags = [f"{others[0]}=1", *(f"{task}=0" for task in missing)]
        typed = " ".join(stage_flag(self._stage, f"data.tasks.{flag}") for flag in flags)
        return f"; {counts[others[0]]:,} have it for {others[0]}: {typed}"

    def _tasks(self) -> list[str]:
        return [task for task, weight in self.builder.data.tasks.items() if weight]

    def _records_with_text(self) -> dict[str, int]:
        """Returns by task how many records have text for it; nothing where there is no index."""
        folders = self.builder.data.folders
        try:
            indexes = [self._opened.index(folder, self._split) for folder in folders]
        except UserError:
            return {}
        return {
            task: sum(np.count_nonzero(one.text_tokens[task]) for one in indexes) for task in TASKS
        }

    def prefetch(self, index: int) -> int:
        """Begins to read the records of a sequence from a bucket; returns how many there are."""
        records = self.schedule.records(index)
        for record in records:
            source = bisect.bisect_right(self._starts, record) - 1
            self._sources[source].prefetch(record - self._starts[source])
        return len(records)

    def _check_fits(self, record: Record, segments: list[Segment]) -> None:
        # They do, unless the index from which the sequence was planned is wrong.
        data = self.builder.data
        num_tokens = sum(len(segment.tokens) for segment in segments)
        num_tiles = sum(len(segment.tile_arrays["tiles"]) for segment in segments)
        if num_tokens > data.seq_len or num_tiles > data.max_tiles:
            if data.packing == "none" and len(segments) > 1:
                raise UserError(
                    f"record {record.id} does not fit beside {len(segments) - 1} of config.data."
                    f"records_per_sequence {data.records_per_sequence}: {num_tokens} of seq_len "
                    f"{data.seq_len} tokens, {num_tiles} of max_tiles {data.max_tiles}"
                )
            raise UserError(
                f"record {record.id} takes more of a row than its index says; `prepare --recount` "
                "mends it"
            )

    def _record(self, index: int) -> Record:
        # Of starts [0, 10, 30] record 12 is number 2 of source 1.
        source = bisect.bisect_right(self._starts, index) - 1
        return self._sources[source][index - self._starts[source]]


class TrainBatches(Iterator[Batch]):
    """A process's rows of a stage's batches, from `start_sequence` (a global count of sequences) to
    the stage's end.

    Attributes:
      next_sequence: global sequences handed out so far.
      num_unused: records that are in no sequence; see `sampler.Schedule`.
      num_unsupervised: records that this process handed out since `start_sequence` and that taught
        nothing: they could not be read, or had no answer that fits.
    """

    def __init__(
        self,
        config: Config,
        *,
        start_sequence: int = 0,
        local_rows: Sequence[int] | None = None,
        schedule_state: Mapping[str, Any] | None = None,
        opened: StageData | None = None,
    ):
        """
        Args:
          config: of the stage.
          start_sequence: global sequences of the stage that have been trained on.
          local_rows: those of each global batch that this process feeds, ascending; by default all
            of them.
          schedule_state: what `schedule_state` gave there. Without it, or where it is of other
            data, the epochs before are planned again to know where this one begins.
          opened: as of `TrainSequences`.
        """
        global_size = config.train.batch_size
        if start_sequence % global_size:
            raise UserError(
                f"data position {start_sequence} is not a multiple of config.train.batch_size "
                f"{global_size}"
            )
        self._sequences = TrainSequences(config, config.data.split, opened)
        self._sequences.schedule.restore(schedule_state or {})
        # Plans the epochs so far in their order; any other would plan some of them twice.
        self.counters(start_sequence)
        self._local_rows = list(range(global_size) if local_rows is None else local_rows)
        self._batches = read_ahead.batches(
            self._sequences,
            range(start_sequence, len(self._sequences), global_size),
            self._local_rows,
            config.data,
        )
        self._global_size = global_size
        self._needs_answers = config.train.answer_weight > 0
        self.next_sequence = start_sequence
        self._max_unsupervised = config.data.max_unsupervised
        self._num_records = self.num_unsupervised = 0
        self.num_unused = self._sequences.schedule.num_unused

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._count_unsupervised(batch)
        self.next_sequence += self._global_size
        return batch

    def counters(self, next_sequence: int) -> dict[str, float]:
        """Returns what all processes had in the sequences before `next_sequence`; see
        `sampler.Schedule`. It follows from the config, so that a run that was stopped counts as one
        that was not."""
        return self._sequences.schedule.counters(next_sequence)

    def schedule_state(self) -> dict[str, Any]:
        """Returns what spares a resumed run the planning of epochs that are over: a dict for
        JSON."""
        return self._sequences.schedule.state()

    def _count_unsupervised(self, batch: Batch) -> None:
        planned = sum(
            self._sequences.schedule.num_records(self.next_sequence + row)
            for row in self._local_rows
        )
        self._num_records += planned
        taught = count_supervised if self._needs_answers else count_seen
        self.num_unsupervised += planned - taught(batch)
        # At the start of a run one bad record would be a large fraction: none is taken of less than
        # 100.
        if self.num_unsupervised > self._max_unsupervised * max(self._num_records, 100):
            raise UserError(
                f"{self.num_unsupervised} of {self._num_records} records cannot be read or have "
                "no answer that fits config.data.seq_len; config.data.max_unsupervised is "
                f"{self._max_unsupervised}"
                + (f"; the first: {self._sequences.problem}" if self._sequences.problem else "")
                + self._sequences.about_text()
                + self._sequences.remedy()
            )


def count_supervised(batch: Batch) -> int:
    """Returns how many records of a batch have a token with loss."""
    # A record is a (row, segment id): each is marked in a bool [B, T + 1] table, as often as it has
    # tokens with loss, and counted once. There are at most T segments, numbered from 1.
    row, column = np.nonzero(batch["loss_weights"])
    size, length = batch["segment_ids"].shape
    is_supervised = np.zeros((size, length + 1), bool)
    is_supervised[row, batch["segment_ids"][row, column]] = True
    return int(is_supervised.sum())


def count_seen(batch: Batch) -> int:
    """Returns how many records of a batch are there at all, with or without an answer that fits:
    those that teach a stage of patch labels alone."""
    # One whose answer does not fit has no tokens, and its patches are there. Segments are numbered
    # over all records of a sequence, also those without tokens.
    has_patches = (batch["patch_loss_weights"] > 0).any((1, 2))
    return int(np.maximum(batch["segment_ids"].max(1), has_patches).sum())


def stack(sequences: list[PackedSequence]) -> Batch:
    """Stacks packed sequences or prompts, each an array's row, to a batch."""
    return Batch(**{name: np.stack([one[name] for one in sequences]) for name in sequences[0]})


def used(batch: Batch, model: ModelConfig, max_tiles: int) -> tuple[float, float]:
    """Returns the fractions of a batch's tokens and of its tiles that are no padding; each of its
    sequences has room for `max_tiles`."""
    if "kept_patches" in batch:
        tiles = float(np.mean(batch["kept_patches"].any(-1)))
    else:
        image_tokens = np.count_nonzero(batch["tokens"] == model.image_token_id)
        tiles = image_tokens / (len(batch["tokens"]) * max_tiles * model.tokens_per_tile)
    return float(np.mean(batch["segment_ids"] > 0)), tiles
