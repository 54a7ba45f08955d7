"""What was held out of training: which sources have any, and the batches of each."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from alignvlm_jax.config import Config, SourceConfig
from alignvlm_jax.data import read_ahead
from alignvlm_jax.data.loader import TrainSequences
from alignvlm_jax.data.mixture import NothingToDraw
from alignvlm_jax.data.read_ahead import LocalSequences
from alignvlm_jax.data.record import Batch
from alignvlm_jax.data.shards import shard_names
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError


def by_source(config: Config, opened: StageData | None = None) -> dict[str, TrainSequences]:
    """Returns the packed sequences of validation on each source, by its name, or "" where there is
    but `data.dir`. Sources without the split are left out, as of a small one nothing may have been
    held out, and those of no use to the stage's tasks; all patches count as labelled. `opened` is
    as of `TrainSequences`.

    Raises:
      UserError: no source has the split, none is of use, or one cannot be read.
    """
    data = dataclasses.replace(config.data, labelled_fraction=1.0)
    # The patch-token loss is measured where it is not trained, too.
    train = dataclasses.replace(config.train, patch_token_weight=1.0)
    split = config.data.validation_split
    folders = {name: source.dir for name, source in data.sources.items()} or {"": data.dir}
    held = {name: folder for name, folder in folders.items() if shard_names(folder, split)}
    if not held:
        raise UserError(
            f"there are no shards of split {split!r} in {', '.join(folders.values())}; prepare it "
            "again with --holdout=0.1 (--holdout_by=page for a single PDF), or measure on what is "
            f"trained: --config.data.validation_split={data.split}"
        )
    opened = opened or StageData.open(config.data, config.model)
    useful: dict[str, TrainSequences] = {}
    problem: UserError | None = None
    for name, folder in held.items():
        # Whatever its fraction of training is, all of it counts here.
        alone = dataclasses.replace(data, sources={name: SourceConfig(dir=folder)} if name else {})
        validated = dataclasses.replace(config, data=alone, train=train)
        try:
            useful[name] = _with_text(TrainSequences(validated, split, opened))
        except NothingToDraw as err:
            problem = problem or err
    if not useful:
        raise problem
    return useful


def _with_text(sequences: TrainSequences) -> TrainSequences:
    """Returns the sequences; raises NothingToDraw where no record has text for any of the tasks,
    which a plan finds by itself, and without one would be a loss of nothing."""
    if sequences.lacks_text():
        data = sequences.builder.data
        raise NothingToDraw(
            f"nothing to validate on in split {data.validation_split!r}: no record has text for "
            f"config.data.tasks {', '.join(data.tasks)}{sequences.remedy()}"
        )
    return sequences


class ValidationBatches:
    """A process's rows of the batches of the validation split, the same ones at every pass, read
    anew in each: kept, those of the paper's stages would take gigabytes of every host.

    Attributes:
      num_records: records in the batches of all processes.
      num_held: records of the split.
    """

    def __init__(
        self,
        sequences: TrainSequences,
        batch_size: int,
        num_sequences: int,
        local_rows: Sequence[int] | None = None,
        gather: Callable[[str | None], list[str | None]] = lambda problem: [problem],
    ):
        """
        Args:
          sequences: of a source; see `by_source`.
          batch_size: rows of a global batch.
          num_sequences: of all processes; rounded down to whole batches, but to no less than one.
          local_rows: as of `TrainBatches`.
          gather: gives what all processes pass to it; by default there is one. One of hundreds may
            have a single row, and that be damaged.

        Raises:
          UserError: no record of any process's rows can be read.
        """
        self._sequences = sequences
        self._starts = range(0, max(1, num_sequences // batch_size) * batch_size, batch_size)
        self._local_rows = list(range(batch_size) if local_rows is None else local_rows)
        numbers = range(len(self._starts) * batch_size)
        # Distinct ones: where fewer were held out than there is room for, they come again.
        self.num_records = len({one for i in numbers for one in sequences.schedule.records(i)})
        self.num_held = sequences.num_records
        self._check(gather)

    def __iter__(self) -> Iterator[Batch]:
        data = self._sequences.builder.data
        return read_ahead.batches(self._sequences, self._starts, self._local_rows, data)

    def _check(self, gather: Callable[[str | None], list[str | None]]) -> None:
        # Of a whole split, mostly one sequence is read: `any` stops at the first that is of use.
        here = LocalSequences(self._sequences, self._starts, self._local_rows)
        is_useful = any(here[i]["loss_weights"].any() for i in range(len(here)))
        problem = None if is_useful else self._sequences.problem
        problems = gather(problem)
        if all(problems):
            split = self._sequences.builder.data.validation_split
            raise UserError(f"nothing to validate on in split {split!r}: {problems[0]}")
