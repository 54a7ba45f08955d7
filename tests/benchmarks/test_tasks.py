"""The table of benchmarks, and what an answer to each is worth."""

import string

import pytest

from alignvlm_jax.benchmarks import tasks
from alignvlm_jax.benchmarks.scores import sums
from alignvlm_jax.benchmarks.scores.task import LEFT_OUT
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


# What the answers and the kind of a question look like, where an answer is not a plain text.
PLAIN = (["1"], "")
LOOKS = {
    "olmocr_bench": (['{"type": "present", "split": "a", "text": "1"}'], ""),
    "ocrbench_v2": (["1"], "cognition VQA en"),
}


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_every_task_rates_right_wrong_and_empty_answers(task):
    (wanted, kind) = LOOKS.get(task.name, PLAIN)
    right = task.rate(" 1\n", wanted, "Which?", kind)
    wrong = task.rate("7777", wanted, "Which?", kind)
    empty = task.rate(" ", wanted, "Which?", kind)
    unasked = task.rate(None, wanted, "Which?", kind)
    whole = sums.total([right])
    assert whole.score(task.main_score) == 1.0
    assert {name.partition("/")[0] for name in right} <= set(task.scores)
    assert set(right) == set(wrong) == set(empty) == set(unasked)
    for rated in (wrong, empty, unasked):
        assert all(value == 0 and weight > 0 for value, weight in rated.values())
    assert task.rate("1", []) == {}
    assert bool(task.leaves_out) == (LEFT_OUT in task.scores)
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


def test_silence_is_right_where_a_test_asks_for_nothing_and_never_where_nobody_asked():
    (bench,) = tasks.find(["olmocr_bench"])
    tests = [
        '{"type": "absent", "split": "heads", "text": "page 7"}',
        '{"type": "present", "split": "text", "text": "page 7"}',
        '{"type": "math", "split": "sums", "math": "x"}',
    ]
    silent = {"pass_rate/heads": (1.0, 1.0), "pass_rate/text": (0.0, 1.0), "left_out": (1.0, 3.0)}
    assert bench.rate("", tests) == silent
    assert bench.rate(None, tests) == silent | {"pass_rate/heads": (0.0, 1.0)}


def test_parts_of_one_language_stand_alone_and_what_is_left_out_is_counted():
    (bench,) = tasks.find(["ocrbench_v2"])
    assert bench.rate("A.", ["A"], "?", "science QA en/multiple choice") == {
        "english/science QA en": (1.0, 1.0),
        "left_out": (0.0, 1.0),
    }
    assert bench.rate("", ["5"], "?", "text spotting en") == {"left_out": (1.0, 1.0)}
    with pytest.raises(UserError, match="no type of OCRBench v2: 'sience QA en'; did you mean"):
        bench.rate("", ["A"], "?", "sience QA en")
