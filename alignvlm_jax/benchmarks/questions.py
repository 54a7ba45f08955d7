"""Which questions of a split are asked."""

import collections
import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

from alignvlm_jax.benchmarks.tasks import Task
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed, exchange

MAX_SHOWN = 5
"""Ids in a message."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A turn of a record: `record` is the record's index in its split, `id` names both, `kind` is
    the record's source. `known_as` is the record's id where it has no other turn: what the
    benchmark, and the server that scores it, call the question."""

    id: str
    record: int
    kind: str
    turn: Turn
    known_as: str


def choose_questions(records: Sequence[Record], count: int | None) -> list[Question]:
    """Returns at most `count` questions, or all: one a document, then a second of each where they
    are too few, and so on.

    Documents are spread evenly over the split, and a hash of its id says which question of a
    document comes first, so that the choice depends on the data alone. Of several processes all
    call this, and the main one reads the records for all.
    """
    chosen = _choose(records, count) if distributed.is_main() else []
    told = exchange.from_main([dataclasses.asdict(question) for question in chosen])
    return [
        Question(
            **fields | {"turn": Turn(fields["turn"]["question"], tuple(fields["turn"]["answers"]))}
        )
        for fields in told
    ]


def _choose(records: Sequence[Record], count: int | None) -> list[Question]:
    num_documents = len(records) if count is None else min(count, len(records))
    indices = [i * len(records) // num_documents for i in range(num_documents)]
    # Without their images, which would be held all at once.
    known = [
        (record.id, record.source, record.turns) for record in map(records.__getitem__, indices)
    ]
    questions = []
    for round_number in range(max((len(turns) for _, _, turns in known), default=0)):
        for index, (record_id, kind, turns) in zip(indices, known, strict=True):
            if round_number < len(turns):
                turn = (zlib.crc32(record_id.encode()) + round_number) % len(turns)
                name = f"{record_id}/{turn}"
                known_as = record_id if len(turns) == 1 else name
                questions.append(Question(name, index, kind, turns[turn], known_as))
    return questions[:count]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task with the records and the questions that are asked of it; `directory` holds them."""

    task: Task
    directory: Path
    records: Sequence[Record]
    questions: tuple[Question, ...]


def open_benchmark(task: Task, data: Path, count: int | None) -> Benchmark:
    """Returns a task with its questions, all of them or at most `count`.

    Raises:
      UserError: the task's folder, its split or its questions are not there, or two questions have
        one id.
    """
    directory = data / (task.folder or task.name)
    records = RecordSource(directory, task.split)
    questions = tuple(choose_questions(records, count))
    if not questions:
        raise UserError(f"split {task.split!r} in {directory} has no questions")
    counts = collections.Counter(question.id for question in questions)
    if twice := [repr(name) for name, number in counts.items() if number > 1]:
        shown = ", ".join(twice[:MAX_SHOWN]) + (
            f" and {len(twice) - MAX_SHOWN} more" if len(twice) > MAX_SHOWN else ""
        )
        raise UserError(
            f"split {task.split!r} in {directory} has more than one question of the id {shown}"
        )
    return Benchmark(task, directory, records, questions)
