"""The comparison of runs: finds them, measures each, and reads the measurements as tables.

Runs lie in a folder as TABLE/ROW_seedN. Runs of a row differ in the seed alone, rows of a table in
what the table is about, and all runs of a table answer the same questions.

The measurements of a run stand in its comparison.json, and nowhere else: `evaluate` and `inspect`,
called for a run with other flags, would otherwise put other questions, or other noise, into the
tables.
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
from alignvlm_jax.analysis import base, noise, separation, vocabulary
from alignvlm_jax.benchmarks import scores, summary
from alignvlm_jax.benchmarks.runner import Runner
from alignvlm_jax.config import Config, DataConfig, EvalConfig
from alignvlm_jax.data import prepared
from alignvlm_jax.errors import UserError, listed
from alignvlm_jax.inference import loading, patch_tokens
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.report import contents
from alignvlm_jax.train import checkpoint, metrics, restore, workdir

FILE = "comparison.json"

RELATIVE_SIGMAS = (0.5, 1.0, 1.5, 2.0)
"""Standard deviations of the noise, in standard deviations of the features."""

NUM_PAGES = 32
"""Number of pages whose visual tokens are compared with and without noise.

The same number of pages chooses the vocabulary entries that are kept, and shows the letters whose
visual tokens are compared.
"""

BETWEEN_SEEDS = ("seed", "init_from", *workdir.RESUMABLE_FIELDS)
"""The fields, and patterns of fields, in which runs of a row may differ: one may start from what
its own seed has trained before."""

REACHED = 0.5
"""The ANLS up to which `Row.steps_to_read` counts the steps."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run with its measurements.

    Attributes:
      folder: its workdir.
      seed: its seed.
      config: the config of its last stage.
      lines: the lines of its metrics.jsonl.
      summary: the fields of `summary.summarize`.
      analyses: results of analyses by name.
    """

    folder: Path
    seed: int
    config: Config
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    analyses: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: the runs of all seeds of one configuration.

    Attributes:
      name: of the row, which no other of its table has.
      runs: in the order of their seeds.
      is_baseline: whether it was added to its table, and is a row of another one.
    """

    name: str
    runs: tuple[Run, ...]
    is_baseline: bool = False

    def values(self, field: str) -> np.ndarray:
        """Returns a field of the summary of every run, [number of runs]."""
        return np.array([run.summary[field] for run in self.runs])

    def steps_to_read(self) -> list[int | None]:
        """Returns the training steps until generated answers scored `REACHED`, for each run.

        It is None for a run that never did. Runs without in-training generation eval are left out.
        """
        compared = ([line for line in run.lines if "generated/anls" in line] for run in self.runs)
        return [
            next((line["step"] for line in lines if line["generated/anls"] >= REACHED), None)
            for lines in compared
            if lines
        ]

    def num_connector_params(self) -> int:
        """Returns the number of parameters of the connector."""
        # By shapes alone: no weights are made or loaded.
        model = vlm.VLM(self.runs[0].config.model)
        params = jax.eval_shape(lambda: vlm.init_params(model, jax.random.key(0)))
        return sum(x.size for x in jax.tree.leaves(params["connector"]))

    def analysis(self, name: str) -> list[Mapping[str, Any]]:
        """Returns the results of an analysis, for the runs that have it."""
        return [run.analyses[name] for run in self.runs if name in run.analyses]


Tables = Mapping[str, Sequence[Row]]


def find(folder: Path) -> list[Path]:
    """Returns the workdirs of the runs in a folder, sorted.

    Raises:
      UserError: there are none, one is not finished, two of a table have different questions, or
        two of a row differ in more than the seed.
    """
    found = sorted(
        path.parent for path in folder.glob(f"*/*/{workdir.CONFIG_FILE}") if _name(path.parent)
    )
    if not found:
        raise UserError(f"{folder} has no runs named TABLE/ROW_seedN")
    firsts: dict[str, Path] = {}
    for run in found:
        steps = sum(stage.train.num_steps for stage in _stages(run))
        if not (run / checkpoint.FOLDER / str(steps)).is_dir():
            raise UserError(f"{run} is not finished: it has no checkpoint of step {steps}")
        # Each run is compared with the first of its table, and with the first of its row.
        _check_questions(run, firsts.setdefault(run.parent.name, run))
        _check_row(run, firsts.setdefault(row_of(run), run))
    return found


def _check_questions(run: Path, first: Path) -> None:
    """Raises UserError where two runs of a table are asked different questions."""
    lasts = [_stages(one)[-1] for one in (run, first)]
    ours, theirs = (_questions_of(last.data, last.eval) for last in lasts)
    if ours != theirs:
        raise UserError(
            f"{run} is asked {ours}, {first} {theirs}: scores of a table are of the same questions"
        )


def _check_row(run: Path, first: Path) -> None:
    """Raises UserError where a run has not the seed of its name, or differs from the first of its
    row in more than the seed: a mean of both would be that of neither."""
    # Before the differences: of a run that was copied to another name, this tells the most.
    _, named = _name(run)
    stages = [_stages(one) for one in (run, first)]
    if (seed := stages[0][-1].seed) != named:
        raise UserError(f"{run} was trained with config.seed={seed}, not {named} as its name says")
    found = workdir.differences(
        *(workdir.without(config_lib.to_json(one), BETWEEN_SEEDS) for one in stages)
    )
    if found:
        texts = [f"{field} is {ours} and {theirs}" for field, ours, theirs in found]
        shown = listed(texts, workdir.MAX_DIFFERENCES)
        raise UserError(f"{run} is no other seed of {first}: {shown}")


def row_of(run: Path) -> str:
    """Returns the name TABLE/ROW of the row that a run stands in; its folder is
    TABLE/ROW_seedN."""
    return f"{run.parent.name}/{_name(run)[0]}"


def is_measured(run: Path) -> bool:
    """Whether a run has measurements, made as `measure` would make them now."""
    path = run / FILE
    found = _read_json(path) if path.exists() else {}
    # What lacks a part, as an empty object does, is made anew.
    is_whole = isinstance(found, dict) and found.keys() >= {"way", "summary", "analyses"}
    return is_whole and found["way"] == _way(run)


def measure(run: Path) -> None:
    """Measures a run and writes its comparison.json.

    The run is evaluated on its splits, with pages and with blank ones, and with noise on the vision
    features. If its patches have a distribution over the vocabulary, it is also evaluated with
    fewer vocabulary entries; if they have a visual token each, those of equal and of different
    letters are compared. Predictions that exist are not made again.
    """
    loaded = loading.load(run, loading.load_config(run))
    config = loaded.config
    evaluator = Runner(loaded)
    splits = config.eval.splits
    results = {
        (split, blind): evaluator.evaluate(split, blind)
        for split in splits
        for blind in (False, True)
    }
    # One seed for all runs, so that each question is seen through the same noise.
    analyses = {
        "noise": noise.measure_features(loaded, splits[0], (), RELATIVE_SIGMAS, NUM_PAGES, seed=0)
    }
    pages = config.data.validation_split
    # Pages whose words are not known show no letters.
    if connectors.get(config.model.connector.name).has_patch_tokens() and separation.tells_letters(
        separation.letters_of(loaded, base.pages(loaded, pages, NUM_PAGES))
    ):
        analyses["separation"] = separation.measure(loaded, pages, NUM_PAGES, seed=0)
    if patch_tokens.has_patch_distribution(config.model):
        # The probability of an entry in an even distribution. In any other one some entries have
        # more and some less, whatever the vocabulary's size.
        threshold = 1 / config.model.llm.unpadded_vocab_size
        analyses["vocabulary"] = vocabulary.measure(loaded, splits[0], pages, NUM_PAGES, threshold)
    fields = {
        "way": _way(run),
        "summary": summary.summarize(loaded, splits, results),
        "analyses": analyses,
    }
    # Written last, and at once: a run whose measuring was interrupted has no such file.
    storage.write_whole(run / FILE, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def read(runs: Sequence[Path]) -> dict[str, list[Row]]:
    """Returns the rows of every table, best first, from the measurements of all runs."""
    tables: dict[str, dict[str, list[Run]]] = {}
    for path in runs:
        name, seed = _name(path)
        measured = _read_json(path / FILE)
        lines = contents.read_metrics(path / metrics.FILE)
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
    """Returns the tables with one row added to all others that have the same questions.

    Where a table has a row of that name already, as those of a sweep do, the added one is called
    "ROW of TABLE".

    Args:
      tables: the tables.
      name: TABLE/ROW, the row to add.
    """
    table, _, row_name = name.partition("/")
    # Scores on other questions would not compare: tables with such are left as they are.
    [baseline] = [row for row in tables[table] if row.name == row_name]

    def questions_of(row: Row) -> str:
        config = row.runs[0].config
        return _questions_of(config.data, config.eval)

    def joined(rows: Sequence[Row]) -> list[Row]:
        is_taken = row_name in {row.name for row in rows}
        name = f"{row_name} of {table}" if is_taken else row_name
        return _sorted([*rows, dataclasses.replace(baseline, name=name, is_baseline=True)])

    return {
        other: joined(rows)
        if other != table and questions_of(rows[0]) == questions_of(baseline)
        else list(rows)
        for other, rows in tables.items()
    }


def settings(tables: Tables) -> dict[str, dict[str, Row]]:
    """Returns the rows of each table by name, for tables that are settings of one comparison.

    They are if several rows of the first stand in all others, too; else there are none. Numbers in
    the names of tables are sorted as numbers.
    """
    # Not baselines, whose numbers are those of another setting.
    named = {
        table: {row.name: row for row in rows if not row.is_baseline}
        for table, rows in tables.items()
    }
    common = set.intersection(*map(set, named.values()))
    if len(tables) < 2 or len(common) < 2:
        return {}
    order = sorted(named, key=lambda name: [*map(_number, re.split(r"(\d+)", name))])
    # In the order of the first table's scores: the same columns in all.
    return {
        table: {name: named[table][name] for name in named[order[0]] if name in common}
        for table in order
    }


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (0, text)


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Returns rows by their mean ANLS, best first."""
    return sorted(rows, key=lambda row: -row.values("anls").mean())


def _way(run: Path) -> dict[str, Any]:
    """Returns everything that the measurements of a run depend on."""
    # `train_seconds` has microseconds: it tells two runs apart that were written to one workdir.
    found = restore.load_config(run)
    trained = restore.read_newest(run, lambda checkpoints, step: checkpoints.metadata(step))
    return {
        "train_seconds": trained["train_seconds"],
        # Lists, as JSON gives them back: a tuple equals no list.
        "sigmas": list(RELATIVE_SIGMAS),
        "num_pages": NUM_PAGES,
        "num_questions": found.eval.num_questions,
        "splits": list(found.eval.splits),
        "data": prepared.fingerprint(found.data.dir),
        "scorer_version": scores.SCORER_VERSION,
        "analyses": ["noise", "separation", "vocabulary"],
    }


def _questions_of(data: DataConfig, evaluation: EvalConfig) -> str:
    """Returns a description of the questions of a run, equal if they are the same."""
    splits = ", ".join(evaluation.splits)
    return f"{evaluation.num_questions} questions of {splits} in {data.dir}"


def _read_json(path: Path) -> Any:
    return contents.parse(path, path.read_text())


def _name(run: Path) -> tuple[str, int] | None:
    """Returns the row and the seed that a workdir's name ROW_seedN gives, or None."""
    # "align_plain_seed2" is ("align_plain", 2).
    match = re.fullmatch(r"(.+)_seed(\d+)", run.name)
    return match and (match[1], int(match[2]))


def _stages(run: Path) -> tuple[Config, ...]:
    """Returns the configs of all stages of a run."""
    return config_lib.from_json(_read_json(run / workdir.CONFIG_FILE))
