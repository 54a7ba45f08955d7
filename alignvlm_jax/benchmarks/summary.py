"""Summaries of the scores of a checkpoint: the file `summary.json`, and tables to print."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from alignvlm_jax import storage
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.benchmarks.scores.sums import Statistics
from alignvlm_jax.benchmarks.tasks import COLUMNS, TASKS, Task, TextTask
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.train import metrics

FILE = "summary.json"
OF_QUESTIONS = ("questions_crc32", "data")
"""Fields of a header of predictions that say which questions are asked, about which documents."""
OF_CHECKPOINT = ("step", "train_seconds")
"""Fields of a header of predictions that say which checkpoint is asked."""


def are_alike(first: Predictions, second: Predictions, fields: Sequence[str]) -> bool:
    """Whether two predictions have the same in some fields of their headers."""
    return all(first.header.get(name) == second.header.get(name) for name in fields)


def blind_of(results: Mapping[tuple[str, bool], Predictions], split: str) -> Predictions | None:
    """Returns the predictions on blank pages of a split; None if there are none, or they are not of
    the same questions, asked of the same checkpoint, as those with pages.

    An evaluation that was stopped has made the one anew, and left the other as it was.
    """
    seen = results.get((split, False))
    blind = results.get((split, True))
    # Without those with pages there is nothing that they could be mixed with.
    if seen and blind and not are_alike(seen, blind, OF_QUESTIONS + OF_CHECKPOINT):
        return None
    return blind


def summarize(
    loaded: Loaded,
    splits: Sequence[str],
    results: Mapping[tuple[str, bool], Predictions],
    of_tasks: Mapping[str, Predictions] | None = None,
) -> dict[str, Any]:
    """Returns the content of summary.json.

    Args:
      loaded: the model.
      splits: names of the splits. Scores of the first have plain names (`anls`), those of others
        end in the split (`anls_unseen_fonts`).
      results: predictions by (split, whether pages are blank). Those that are missing leave their
        fields out, and so do those on blank pages that are of other questions.
      of_tasks: predictions by task, for the field `tasks`, which is left out if there are none.
    """
    fields: dict[str, Any] = {}
    for split in splits:
        end = "" if split == splits[0] else f"_{split}"
        if (split, False) in results:
            with_pages = results[split, False]
            fields |= {
                f"anls{end}": with_pages.mean("score"),
                f"exact_match{end}": with_pages.mean("exact"),
            }
            fields[f"num_eval{end}"] = len(with_pages.rows)
            # Of transcriptions alone, and of files that have it.
            more = {
                f"cer{end}": with_pages.character_error_rate(),
                f"num_cut{end}": with_pages.num_cut(),
            }
            fields |= {name: value for name, value in more.items() if value is not None}
        if blind := blind_of(results, split):
            fields[f"anls_blind{end}"] = blind.mean("score")
    if of_tasks:
        fields["tasks"] = {name: _of_task(result) for name, result in of_tasks.items()}
    return fields | {
        # Beside the scores, what they cost and which run they are of.
        "train_seconds": loaded.metadata["train_seconds"],
        "num_params": sum(x.size for x in jax.tree.leaves(loaded.params)),
        "connector": loaded.config.model.connector.name,
        "seed": loaded.config.seed,
        "step": loaded.step,
        "peak_memory_gib": metrics.peak_memory_gib(),
    }


def _of_task(result: Predictions) -> dict[str, Any]:
    """Returns the scores and the counts of a task; scores are left out if no answer is known."""
    totals = result.statistics()
    # Of a score of several parts both its own name and those of the parts.
    names = {name: None for part in totals.weights for name in (part.partition("/")[0], part)}
    scores = {name: totals.score(name) for name in names}
    counts = {"num_eval": len(result.rows), "num_problems": len(result.problems())}
    num_cut = result.num_cut()
    return scores | counts | ({} if num_cut is None else {"num_cut": num_cut})


def write(workdir: Path, fields: Mapping[str, Any]) -> None:
    """Writes summary.json in one step: a reader never sees a part of it."""
    storage.write_whole(workdir / FILE, json.dumps(fields, indent=2) + "\n")


NONE = "-"


def paper_table(results: Mapping[str, Predictions]) -> Table:
    """Returns the scores as a row of the paper's table 1, in percent; it fits 80 characters.

    A benchmark without predictions or without known answers is a dash. The mean is a dash unless
    all nine are there, because a mean of fewer does not compare.
    """
    found = columns(results)
    mean = None if None in found.values() else sum(found.values()) / len(found)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in (*found, "mean"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(*(_percent(score) for score in (*found.values(), mean)))
    return table


def columns(results: Mapping[str, Predictions]) -> dict[str, float | None]:
    """Returns the mean main score of the tasks of each column of the paper's table.

    It is None if a task of the column is missing.
    """
    found: dict[str, float | None] = {}
    for column in COLUMNS:
        members = [task for task in TASKS.values() if task.column == column]
        scores = [
            results[task.name].statistics().score(task.main_score)
            for task in members
            if task.name in results
        ]
        # A mean of fewer tasks than the paper's would look like its number and not be it.
        is_whole = len(scores) == len(members) and None not in scores
        found[column] = sum(scores) / len(scores) if is_whole else None
    return found


def task_table(tasks: Sequence[Task | TextTask], results: Mapping[str, Predictions]) -> Table:
    """Returns a table of the scores of each task, its main score first.

    It also has the number of questions (or texts) of each task, and of those that could not be
    asked.
    """
    table = Table("task", "score", box=None)
    for title in ("", "asked", "not asked"):
        table.add_column(title, justify="right")
    for task in tasks:
        result = results[task.name]
        totals = results[task.name].statistics()
        if isinstance(task, TextTask):
            lines = [(f"{task.score}, less is better", f"{totals.score(task.score):.3f}  ")]
        else:
            # The parts of a score stand below it, in the order in which questions had them.
            names = [name for whole in task.scores for name in (whole, *totals.parts(whole))]
            lines = [
                (f"  {name.partition('/')[2]}" if "/" in name else name, _percent_of(totals, name))
                for name in names
            ]
        for number, line in enumerate(lines):
            counts = (
                ("", "") if number else (f"{len(result.rows):,}", f"{len(result.problems()):,}")
            )
            table.add_row("" if number else task.name, *line, *counts)
    return table


def _percent_of(totals: Statistics, name: str) -> str:
    return f"{_percent(totals.score(name))} %"


def _percent(score: float | None) -> str:
    """Returns a score in percent with two decimals, a dash for None."""
    return NONE if score is None else f"{100 * score:.2f}"
