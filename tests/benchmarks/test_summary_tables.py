"""The paper's table: what is missing is a dash."""

import io

from rich.console import Console

from alignvlm_jax.benchmarks import summary, tasks
from alignvlm_jax.benchmarks.predictions import Predictions


def result(name: str, score: float) -> Predictions:
    return Predictions(
        {}, [{"scores": {tasks.TASKS[name].main_score: [score, 1.0]}, "answers": ["1"]}]
    )


def text(table) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return file.getvalue()


def printed(results) -> list[str]:
    shown = text(summary.paper_table(results))
    assert all(column in shown for column in tasks.COLUMNS)
    return shown.split()


def test_a_column_of_several_tasks_needs_them_all():
    results = {
        name: result(name, score)
        for name, score in zip(tasks.GROUPS["tablevqa"], (1, 0, 0.5, 0.5), strict=True)
    }
    assert summary.columns(results)["TableVQA"] == 0.5
    del results["vwtq"]
    assert summary.columns(results)["TableVQA"] is None


def test_what_was_not_asked_is_a_dash_and_so_is_the_mean():
    cells = printed({"docvqa": result("docvqa", 0.7963), "chartqa": result("chartqa", 0.25)})
    assert cells[-10:] == ["79.63", "-", "-", "-", "-", "-", "25.00", "-", "-", "-"]


def test_the_mean_is_of_all_nine():
    results = {task.name: result(task.name, 0.5) for task in tasks.TASKS.values() if task.column}
    results["docvqa"] = result("docvqa", 0.95)
    assert printed(results)[-1] == "55.00"
    results["klc"] = Predictions({}, [{"scores": {}, "answers": []}])
    assert printed(results)[-1] == "-"


def test_bits_stand_beside_percent_and_in_no_column_of_the_paper():
    row = {"scores": {"bits_per_byte": [11.0, 8]}}
    bits = Predictions({}, [row, {"scores": {}, "problem": "record d1 has no text"}])
    results = {"text_bpb": bits, "docvqa": result("docvqa", 0.25)}
    lines = text(summary.task_table(tasks.find(results), results)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["text_bpb", "bits_per_byte,", "less", "is", "better", "1.375", "2", "1"],
        ["docvqa", "anls", "25.00", "%", "1", "0"],
        ["exact_match", "-", "%"],
    ]
    assert printed(results)[-10:] == ["25.00", *"-" * 9]
