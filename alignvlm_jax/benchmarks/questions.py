"""The choice of the questions of a split, and the data of a benchmark."""

import collections
import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignvlm_jax.benchmarks.tasks import Task
from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed, exchange

MAX_SHOWN = 5
"""Most ids that an error message names."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question: one turn of a record.

    Attributes:
      id: names the record and the turn.
      record: index of the record in its split.
      kind: source of the record.
      turn: the question and its answers.
      known_as: the name that the benchmark and its server give to the question: its own id where it
        has one, else the record's if that has a single turn, else `id`.
      before: the turns of the conversation that the question goes on.
      system: the system turn of the record.
    """

    id: str
    record: int
    kind: str
    turn: Turn
    known_as: str
    before: tuple[Turn, ...] = ()
    system: str = ""

    def told(self) -> list[Any]:
        """Returns what a prompt holds beside the question and its images, as JSON has it; empty for
        a question that stands alone."""
        has_more = self.before or self.system or self.turn.image_offsets
        before = [dataclasses.asdict(turn) for turn in self.before]
        return [before, self.system, self.turn.image_offsets] if has_more else []

    def chat_turn(self, text: str = "") -> ChatTurn:
        """Returns the question for a prompt, or a `text` that holds it."""
        offsets = self.turn.image_offsets
        # Images keep their places in the question, wherever in the text it begins.
        moved = text.find(self.turn.question) if text else 0
        return ChatTurn(text or self.turn.question, "", tuple(at + moved for at in offsets))


def choose_questions(records: Sequence[Record], count: int | None) -> list[Question]:
    """Returns at most `count` questions of a split, or all questions if `count` is None.

    Each chosen record gives one question, then each a second one if there are too few, and so on.
    Records are spread evenly over the split, and a hash of its id says which question of a record
    comes first: the choice depends on the data alone. All processes call this together; the main
    one reads the records and sends the questions to the others.
    """
    # Sent as plain dicts and lists, which JSON holds: tuples come back as lists.
    chosen = _choose(records, count) if distributed.is_main() else []
    told = exchange.from_main([dataclasses.asdict(question) for question in chosen])
    return [
        Question(
            **fields
            | {"turn": _turn(fields["turn"]), "before": tuple(map(_turn, fields["before"]))}
        )
        for fields in told
    ]


def _turn(fields: dict[str, Any]) -> Turn:
    """Returns a turn from its fields, in which tuples have become lists."""
    tuples = {name: tuple(fields[name]) for name in ("answers", "image_offsets")}
    return Turn(**fields | tuples)


def _choose(records: Sequence[Record], count: int | None) -> list[Question]:
    """Returns the questions that `choose_questions` describes, in one process."""
    num_documents = len(records) if count is None else min(count, len(records))
    # 4 of 10 records are 0, 2, 5 and 7.
    indices = [i * len(records) // num_documents for i in range(num_documents)]
    # Without their images, which would be held all at once.
    known = [
        (record.id, record.source, record.turns, record.has_order, record.system)
        for record in map(records.__getitem__, indices)
    ]
    questions = []
    for round_number in range(max((len(turns) for _, _, turns, *_ in known), default=0)):
        for index, (record_id, kind, turns, has_order, system) in zip(indices, known, strict=True):
            if round_number < len(turns):
                # Starting at a hash: always taking turn 0 would favour one type of question where
                # a data set writes its types in a fixed order.
                turn = (zlib.crc32(record_id.encode()) + round_number) % len(turns)
                name = f"{record_id}/{turn}"
                known_as = turns[turn].id or (record_id if len(turns) == 1 else name)
                before = turns[:turn] if has_order else ()
                questions.append(Question(name, index, kind, turns[turn], known_as, before, system))
    return questions[:count]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task with its data.

    Attributes:
      task: the task.
      directory: folder of the prepared data.
      records: all records of the task's split.
      questions: the chosen questions.
    """

    task: Task
    directory: Path
    records: Sequence[Record]
    questions: tuple[Question, ...]


def open_benchmark(task: Task, data: Path, count: int | None) -> Benchmark:
    """Returns a task with its records and its questions.

    Args:
      task: the task.
      data: folder of all benchmarks.
      count: the largest number of questions; None takes all.

    Raises:
      UserError: the task's folder, its split or its questions are not there, two questions have
        one id, or the task cannot score a question.
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
    for question in questions:
        # Of no prediction: what cannot be scored is found before hours of generation.
        try:
            task.rate("", question.turn.answers, question.turn.question, question.kind)
        except (UserError, ValueError, KeyError, TypeError) as err:
            raise UserError(
                f"question {question.id!r} in {directory} is none of {task.name}: {err}"
            ) from err
    return Benchmark(task, directory, records, questions)
