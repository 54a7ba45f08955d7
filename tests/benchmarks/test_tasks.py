"""The table of benchmarks, and what an answer to each is worth."""

import string

import pytest

from alignvlm_jax.benchmarks import tasks
from alignvlm_jax.errors import UserError


def test_the_table_has_the_columns_of_the_paper():
    paper = [
        "DocVQA",
        "InfoVQA",
        "DeepForm",
        "KLC",
        "WTQ",
        "TabFact",
        "ChartQA",
        "TextVQA",
        "TableVQA",
    ]
    assert list(tasks.COLUMNS) == paper
    assert len(tasks.find(["tablevqa"])) == 4
    assert all(task.column == "TableVQA" for task in tasks.find(["tablevqa"]))


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_every_task_rates_right_wrong_and_empty_answers(task):
    wanted = ["1"]
    right = task.rate(" 1\n", wanted)
    wrong = task.rate("7777", wanted)
    empty = task.rate(" ", wanted)
    assert right[task.main_score][0] == right[task.main_score][1] > 0
    assert set(right) == set(wrong) == set(empty) == set(task.scores)
    for rated in (wrong, empty):
        assert all(value == 0 and weight > 0 for value, weight in rated.values())
    assert task.rate("1", []) == {}
    fields = [name for _, name, _, _ in string.Formatter().parse(task.prompt) if name is not None]
    assert fields == ([] if task.name.startswith("vcr") else ["question"])


def test_an_empty_answer_is_never_right():
    """The normaliser of VQA makes nothing of an article."""
    (textvqa,) = tasks.find(["textvqa"])
    assert textvqa.rate("", ["the"])["vqa_accuracy"] == (0.0, 1.0)
    assert textvqa.rate("a", ["the"])["vqa_accuracy"] == (1.0, 1.0)


def test_several_answers_are_parted_as_the_prompt_asks():
    (vwtq,) = tasks.find(["vwtq"])
    assert vwtq.rate(" Tomato||Apple ", ["Apple|Tomato"])["denotation_accuracy"] == (1.0, 1.0)


def test_names_are_found_once_and_typos_have_a_hint():
    assert [task.name for task in tasks.find(["vwtq", "docvqa", "tablevqa"])][:2] == [
        "vwtq",
        "docvqa",
    ]
    assert len(tasks.find(["vwtq", "docvqa", "tablevqa"])) == 5
    assert [task.name for task in tasks.find(["text_bpb", "debian_tables", "text_bpb"])] == [
        "text_bpb",
        "debian_tables",
    ]
    with pytest.raises(UserError, match="unknown task 'text_bpd'; did you mean 'text_bpb'"):
        tasks.find(["text_bpd"])
    with pytest.raises(UserError, match=r"known: .*, text_bpb, "):
        tasks.find(["?"])
    with pytest.raises(UserError, match="unknown task 'docvqs'; did you mean 'docvqa'"):
        tasks.find(["chartqa", "docvqs"])
    with pytest.raises(UserError, match="did you mean 'tablevqa'"):
        tasks.find(["tablevq"])


def test_names_are_of_one_thing_each():
    assert (
        len(set(tasks.NAMES))
        == len(tasks.NAMES)
        == len(tasks.TASKS) + len(tasks.TEXTS) + len(tasks.GROUPS)
    )
