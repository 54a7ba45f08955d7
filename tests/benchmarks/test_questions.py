"""Which questions are asked, and that each has a name of its own."""

import pytest

from alignvlm_jax.benchmarks import questions, tasks
from alignvlm_jax.data import shards
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.errors import UserError


def documents(num_turns: list[int]) -> list[Record]:
    turns = [
        tuple(Turn(f"{i}-{j}?", ("1",)) for j in range(count)) for i, count in enumerate(num_turns)
    ]
    return [Record(f"d{i}", "form", (), document) for i, document in enumerate(turns)]


def test_one_question_a_document_before_second_ones():
    chosen = questions.choose_questions(documents([3, 1, 0, 2]), 5)
    assert [question.record for question in chosen] == [0, 1, 3, 0, 3]
    assert len({question.id for question in chosen}) == 5
    for question in chosen:
        assert question.turn.question == f"{question.record}-{question.id.split('/')[1]}?"
    assert len(questions.choose_questions(documents([3, 1, 0, 2]), 100)) == 6
    assert questions.choose_questions(documents([0]), 5) == questions.choose_questions([], 5) == []


def test_the_choice_is_spread_over_documents_and_turns():
    chosen = questions.choose_questions(documents([4] * 1000), 250)
    assert [question.record for question in chosen] == list(range(0, 1000, 4))
    first_turns = [question.turn.question.split("-")[1] for question in chosen]
    assert all(40 < first_turns.count(f"{turn}?") < 85 for turn in range(4))
    assert chosen == questions.choose_questions(documents([4] * 1000), 250)


def test_all_questions_of_all_documents():
    chosen = questions.choose_questions(documents([3, 1, 0, 2]), None)
    assert len({question.id for question in chosen}) == len(chosen) == 6


@pytest.mark.parametrize(
    ("num_turns", "count", "expected"),
    [
        # Every second record is only to be read: the evenly spread half has none.
        ([0, 1] * 500, 500, 500),
        ([0, 1] * 500, 100, 100),
        ([0, 2] * 500, 700, 700),
        ([0] * 997 + [1, 2, 3], 5, 5),
    ],
)
def test_records_without_questions_do_not_count(num_turns, count, expected):
    chosen = questions.choose_questions(documents(num_turns), count)
    assert len({question.id for question in chosen}) == len(chosen) == expected
    assert all(num_turns[question.record] for question in chosen)
    # Spread over all records as before.
    assert max(question.record for question in chosen) > 0.9 * len(num_turns)


def test_of_a_large_set_no_more_is_read_than_is_needed():
    class Counting(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    records = Counting(documents([1, 0, 1, 0, 0] * 2000))
    assert len(questions.choose_questions(records, 100)) == 100
    assert records.read <= 500
    # Nor of one that has none.
    records = Counting(documents([0] * 20_000))
    assert questions.choose_questions(records, 8) == []
    assert records.read < 3_000


def test_questions_without_an_answer_are_asked_only_where_that_is_of_use():
    turns = (Turn("a?", ("1",)), Turn("b?", ()), Turn("c?", ("2",)))
    records = [Record("d", "form", (), turns), Record("e", "form", (), turns[1:2])]
    chosen = questions.choose_questions(records, None)
    assert {question.turn.question for question in chosen} == {"a?", "c?"}
    assert len(questions.choose_questions(records, None, needs_answers=False)) == 4


def write_task(folder, records) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_shard(folder / shards.shard_name("validation", 0, 1), records)


def test_a_benchmark_knows_its_questions_by_the_ids_of_its_source(tmp_path):
    write_task(tmp_path / "docvqa", documents([1, 2]))
    opened = questions.open_benchmark(tasks.TASKS["docvqa"], tmp_path, None)
    assert {question.id: question.known_as for question in opened.questions} == {
        "d0/0": "d0",
        "d1/0": "d1/0",
        "d1/1": "d1/1",
    }
    assert [opened.records[question.record].id for question in opened.questions] == [
        "d0",
        "d1",
        "d1",
    ]
    assert len(questions.open_benchmark(tasks.TASKS["docvqa"], tmp_path, 2).questions) == 2


def test_bad_folders_are_named(tmp_path):
    task = tasks.TASKS["docvqa"]
    with pytest.raises(UserError, match=r"no shards of split 'validation' in .*docvqa"):
        questions.open_benchmark(task, tmp_path, None)
    write_task(tmp_path / "docvqa", documents([0]))
    with pytest.raises(UserError, match="has no questions"):
        questions.open_benchmark(task, tmp_path, None)
    write_task(tmp_path / "docvqa", documents([2, 1]) + documents([2, 1]))
    with pytest.raises(UserError, match="more than one question of the id") as error:
        questions.open_benchmark(task, tmp_path, None)
    assert all(repr(name) in str(error.value) for name in ("d0/0", "d0/1", "d1/0"))
