"""Runs that are compared: TABLE/ROW_seedN in a folder. Runs of a row differ in the seed alone, rows
of a table in what the table is about; all of a table are asked the same questions.

What was measured of a run stands in its comparison.json, and nowhere else: `evaluate` and
`inspect`, called for a run with other flags, would otherwise put other questions, or other noise,
into the tables.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.analysis import noise, vocabulary
from alignvlm_jax.benchmarks import scores, summary
from alignvlm_jax.benchmarks.runner import Runner
from alignvlm_jax.config import Config, DataConfig, EvalConfig
from alignvlm_jax.data import shards
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading, patch_tokens
from alignvlm_jax.models import vlm
from alignvlm_jax.report import run as run_lib
from alignvlm_jax.train import checkpoint, metrics, restore, workdir

FILE = "comparison.json"

RELATIVE_SIGMAS = (0.5, 1.0, 1.5, 2.0)
"""Of the noise, in standard deviations of the features."""

NUM_PAGES = 32
"""Pages whose visual tokens are compared with and without noise, and that choose the words that are
kept."""

REACHED = 0.5
"""ANLS that `Row.steps_to_read` counts the steps to."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished run left: its `config`, its metrics' lines, the fields of
    `summary.summarize`, and analyses by name."""

    folder: Path
    seed: int
    config: Config
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    analyses: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of all seeds of one thing."""

    name: str
    runs: tuple[Run, ...]

    def values(self, field: str) -> np.ndarray:
        """Returns a field of the summary, of every run."""
        return np.array([run.summary[field] for run in self.runs])

    def steps_to_read(self) -> list[int | None]:
        """Returns of every run that was asked while it was trained the steps until its answers
        scored REACHED, None where they did not."""
        compared = ([line for line in run.lines if "generated/anls" in line] for run in self.runs)
        return [
            next((line["step"] for line in lines if line["generated/anls"] >= REACHED), None)
            for lines in compared
            if lines
        ]

    def num_connector_params(self) -> int:
        """Returns the parameters of the connector."""
        model = vlm.VLM(self.runs[0].config.model)
        params = jax.eval_shape(lambda: vlm.init_params(model, jax.random.key(0)))
        return sum(x.size for x in jax.tree.leaves(params["connector"]))

    def analysis(self, name: str) -> list[Mapping[str, Any]]:
        """Returns an analysis of the runs that have it."""
        return [run.analyses[name] for run in self.runs if name in run.analyses]


Tables = Mapping[str, Sequence[Row]]


def find(folder: Path) -> list[Path]:
    """Returns the workdirs of the runs, sorted.

    Raises:
      UserError: there are none, one is not finished, or two of a table are not to be asked the
        same.
    """
    found = sorted(
        path.parent for path in folder.glob(f"*/*/{workdir.CONFIG_FILE}") if _name(path.parent)
    )
    if not found:
        raise UserError(f"{folder} has no runs named TABLE/ROW_seedN")
    firsts: dict[str, Path] = {}
    for run in found:
        stages = _stages(run)
        steps = sum(stage.train.num_steps for stage in stages)
        if not (run / checkpoint.FOLDER / str(steps)).is_dir():
            raise UserError(f"{run} is not finished: it has no checkpoint of step {steps}")
        first = firsts.setdefault(run.parent.name, run)
        last = stages[-1]
        ours = _questions_of(last.data, last.eval)
        last = _stages(first)[-1]
        theirs = _questions_of(last.data, last.eval)
        if ours != theirs:
            raise UserError(
                f"{run} is asked {ours}, {first} {theirs}: scores of a table are of the same "
                "questions"
            )
    return found


def row_of(run: Path) -> str:
    """Returns TABLE/ROW of a run's workdir."""
    return f"{run.parent.name}/{_name(run)[0]}"


def is_measured(run: Path) -> bool:
    """Whether `measure` is done with a run, in the same way."""
    path = run / FILE
    return path.exists() and _read_json(path)["way"] == _way(run)


def measure(run: Path) -> None:
    """Evaluates a run on its splits, with pages and blank ones, asks it through noise, and, where
    its patches have a distribution over words, with fewer words. What was asked already is not
    asked again."""
    loaded = loading.load(run, loading.load_config(run))
    config = loaded.config
    evaluator = Runner(loaded)
    splits = config.eval.splits
    results = {
        (split, blind): evaluator.evaluate(split, blind)
        for split in splits
        for blind in (False, True)
    }
    analyses = {
        "noise": noise.measure_features(loaded, splits[0], (), RELATIVE_SIGMAS, NUM_PAGES, seed=0)
    }
    if patch_tokens.has_patch_distribution(config.model):
        pages = config.data.validation_split
        # More than an even fraction of the vocabulary: of any there are such words, and not all of
        # them.
        threshold = 1 / config.model.llm.unpadded_vocab_size
        analyses["vocabulary"] = vocabulary.measure(loaded, splits[0], pages, NUM_PAGES, threshold)
    fields = {
        "way": _way(run),
        "summary": summary.summarize(loaded, splits, results),
        "analyses": analyses,
    }
    storage.write_whole(run / FILE, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def read(runs: Sequence[Path]) -> dict[str, list[Row]]:
    """Returns the rows of every table, the best first; all runs are measured."""
    tables: dict[str, dict[str, list[Run]]] = {}
    for path in runs:
        name, seed = _name(path)
        measured = _read_json(path / FILE)
        lines = run_lib.read_metrics(path / metrics.FILE)
        run = Run(path, seed, _stages(path)[-1], lines, measured["summary"], measured["analyses"])
        tables.setdefault(path.parent.name, {}).setdefault(name, []).append(run)
    return {
        table: _sorted(
            Row(name, tuple(sorted(found, key=lambda run: run.seed)))
            for name, found in rows.items()
        )
        for table, rows in tables.items()
    }


def with_baseline(tables: Tables, name: str) -> dict[str, list[Row]]:
    """Returns the tables with the row TABLE/ROW in every other one that is asked the same
    questions, too."""
    table, _, row_name = name.partition("/")
    [baseline] = [row for row in tables[table] if row.name == row_name]

    def questions_of(row: Row) -> str:
        config = row.runs[0].config
        return _questions_of(config.data, config.eval)

    return {
        other: _sorted([*rows, baseline])
        if other != table and questions_of(rows[0]) == questions_of(baseline)
        else list(rows)
        for other, rows in tables.items()
    }


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """The best first."""
    return sorted(rows, key=lambda row: -row.values("anls").mean())


def _way(run: Path) -> dict[str, Any]:
    """What the measurements depend on; to the microsecond, `train_seconds` tells two runs of a
    workdir apart."""
    found = restore.load_config(run)
    trained = restore.read_newest(run, lambda checkpoints, step: checkpoints.metadata(step))
    return {
        "train_seconds": trained["train_seconds"],
        "sigmas": list(RELATIVE_SIGMAS),
        "num_pages": NUM_PAGES,
        "num_questions": found.eval.num_questions,
        "splits": list(found.eval.splits),
        "data": shards.fingerprint(found.data.dir),
        "scorer_version": scores.SCORER_VERSION,
    }


def _questions_of(data: DataConfig, evaluation: EvalConfig) -> str:
    splits = ", ".join(evaluation.splits)
    return f"{evaluation.num_questions} questions of {splits} in {data.dir}"


def _read_json(path: Path) -> Any:
    return run_lib.parse(path, path.read_text())


def _name(run: Path) -> tuple[str, int] | None:
    """Row and seed."""
    match = re.fullmatch(r"(.+)_seed(\d+)", run.name)
    return match and (match[1], int(match[2]))


def _stages(run: Path) -> tuple[Config, ...]:
    return config_lib.from_json(_read_json(run / workdir.CONFIG_FILE))
