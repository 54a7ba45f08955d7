"""Scores of benchmarks as tables to print."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from alignvlm_jax.eval.predictions import Predictions
from alignvlm_jax.eval.tasks import COLUMNS, TASKS, Task, TextTask

NONE = "-"


def paper_table(results: Mapping[str, Predictions]) -> Table:
    """Returns a row of the paper's table 1, in percent; it fits 80 characters. What was not asked, or has no known
    answers, is a dash; so is the mean, which compares only if it is of all nine."""
    found = columns(results)
    mean = None if None in found.values() else sum(found.values()) / len(found)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in (*found, "mean"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(*(_percent(score) for score in (*found.values(), mean)))
    return table


def columns(results: Mapping[str, Predictions]) -> dict[str, float | None]:
    """Returns by column of the paper's table the mean of its tasks' own scores, None where one of them is missing."""
    found: dict[str, float | None] = {}
    for column in COLUMNS:
        members = [task for task in TASKS.values() if task.column == column]
        scores = [results[task.name].statistics().score(task.main_score) for task in members if task.name in results]
        is_whole = len(scores) == len(members) and None not in scores
        found[column] = sum(scores) / len(scores) if is_whole else None
    return found


def task_table(tasks: Sequence[Task | TextTask], results: Mapping[str, Predictions]) -> Table:
    """Returns a row a task: its own score by name, the others, and how many questions were asked, or texts read."""
    table = Table("task", "score", box=None)
    for title in ("", "asked", "not asked"):
        table.add_column(title, justify="right")
    for task in tasks:
        result, totals = results[task.name], results[task.name].statistics()
        if isinstance(task, TextTask):
            lines = [(f"{task.score}, less is better", f"{totals.score(task.score):.3f}  ")]
        else:
            lines = [(name, f"{_percent(totals.score(name))} %") for name in task.scores]
        for number, line in enumerate(lines):
            counts = ("", "") if number else (f"{len(result.rows):,}", f"{len(result.problems()):,}")
            table.add_row("" if number else task.name, *line, *counts)
    return table


def _percent(score: float | None) -> str:
    return NONE if score is None else f"{100 * score:.2f}"
