"""The choice of the questions of a split, and the data of a benchmark."""

import collections
import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignvlm_jax.benchmarks.tasks import Task
from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.errors import UserError, listed
from alignvlm_jax.parallel import distributed, exchange

MAX_READ = 8
"""Records that are looked at for a question, about, where most have none."""
MIN_READ = 1000
"""Records that are looked at in any case."""
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


def choose_questions(
    records: Sequence[Record], count: int | None, needs_answers: bool = True
) -> list[Question]:
    """Returns at most `count` questions of a split, or all questions if `count` is None.

    Each chosen record gives one question, then each a second one if there are too few, and so on.
    Records are spread evenly over those of the split that have questions, and a hash of its id says
    which question of a record comes first: the choice depends on the data alone. All processes call
    this together; the main one reads the records and sends the questions to the others.

    Args:
      needs_answers: leaves out questions without an answer, which cannot be scored.
    """
    # Sent as plain dicts and lists, which JSON holds: tuples come back as lists.
    chosen = _choose(records, count, needs_answers) if distributed.is_main() else []
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


class _Source(NamedTuple):
    """What is known of a record without its images, which would be held all at once; `usable` are
    the turns whose questions can be put."""

    index: int
    id: str
    source: str
    turns: tuple[Turn, ...]
    has_order: bool
    system: str
    usable: list[int]

    def question(self, round_number: int) -> Question:
        """Returns the record's question of a round, of which it has as many as usable turns."""
        # Starting at a hash: always taking turn 0 would favour one type of question where a data
        # set writes its types in a fixed order.
        turn = self.usable[(zlib.crc32(self.id.encode()) + round_number) % len(self.usable)]
        name = f"{self.id}/{turn}"
        known_as = self.turns[turn].id or (self.id if len(self.turns) == 1 else name)
        before = self.turns[:turn] if self.has_order else ()
        own = self.turns[turn]
        return Question(name, self.index, self.source, own, known_as, before, self.system)


def _choose(records: Sequence[Record], count: int | None, needs_answers: bool) -> list[Question]:
    """Returns the questions that `choose_questions` describes, in one process."""
    wanted = len(records) if count is None else min(count, len(records))
    number = wanted
    read: dict[int, _Source] = {}
    while True:
        indices = _spread(len(records), number)
        for index in {*indices} - read.keys():
            read[index] = _source(index, records[index], needs_answers)
        found = [read[index] for index in indices if read[index].usable]
        if len(found) >= wanted or number >= min(len(records), MAX_READ * wanted + MIN_READ):
            break
        # Many records have none, as pages that are only to be read: look at twice as many, but not
        # at all of a large set, each of which may be a request.
        number = min(2 * number, len(records))
    # Twice as many may have been found: spread anew, or the first of the split would be preferred.
    chosen = [found[place] for place in _spread(len(found), min(wanted, len(found)))]
    rounds = max((len(one.usable) for one in chosen), default=0)
    questions = [one.question(i) for i in range(rounds) for one in chosen if i < len(one.usable)]
    return questions[:count]


def _spread(size: int, number: int) -> list[int]:
    """Returns so many of `size` places, evenly: 4 of 10 are 0, 2, 5 and 7."""
    return [i * size // number for i in range(number)]


def _source(index: int, record: Record, needs_answers: bool) -> _Source:
    turns = record.turns
    usable = [i for i, turn in enumerate(turns) if turn.answers or not needs_answers]
    return _Source(index, record.id, record.source, turns, record.has_order, record.system, usable)


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
    # A test set may keep its answers to itself: what is said to it is handed in elsewhere.
    questions = tuple(choose_questions(records, count, needs_answers=False))
    if not questions:
        raise UserError(f"split {task.split!r} in {directory} has no questions")
    counts = collections.Counter(question.id for question in questions)
    if twice := [repr(name) for name, number in counts.items() if number > 1]:
        shown = listed(twice, MAX_SHOWN)
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
