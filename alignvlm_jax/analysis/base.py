"""What an analysis of a trained model is, and what analyses share: flags, tables, the file that
each of them leaves."""

import abc
import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table

from alignvlm_jax import storage
from alignvlm_jax.config import Config, DataConfig, EvalConfig
from alignvlm_jax.data import shards
from alignvlm_jax.flag_types import positive
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.parallel import distributed
from alignvlm_jax.pictures import html

FOLDER = "analysis"


class Analysis(Protocol):
    """Something that a trained model is measured for: `inspect --analysis=NAME` runs it, and the
    report of the workdir shows it.

    `found` is what `measure` returned: plain values that JSON holds. `written` is what the file
    NAME.json holds: `found`, the "settings" and what `write` says of the checkpoint.

    Attributes:
      name: stem of the files analysis/NAME.json and NAME.png.
      help: what it measures, for --help.
      title: heads its section of the report.
      needs_distribution: whether it reads the patches' distribution over the vocabulary: of another
        connector it is refused.
    """

    name: str
    help: str
    title: str
    needs_distribution: bool = False

    def kinds(self) -> Mapping[str, "Analysis"]:
        """Returns analyses by what `--kind` calls them, this one first; none has no such flag."""
        return {}

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Adds flags beside `--analysis`, `--checkpoint` and `--data`; by default none."""

    def check(self, config: Config, args: argparse.Namespace) -> None:
        """Raises UserError for flags that cannot be met. It runs before the model is loaded, so
        that no mistake waits for that; `check_splits` runs before it."""

    @abc.abstractmethod
    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        """Returns what is found. Of several processes all call it."""

    @abc.abstractmethod
    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints the table of what was found."""

    @abc.abstractmethod
    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of what was found of a model with this connector."""

    @abc.abstractmethod
    def sentence(self, written: Mapping[str, Any]) -> str:
        """Returns the main numbers in words, for the report."""

    def section(self, folder: Path, written: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the template of the report shows, with the picture of the folder that
        NAME.json lies in; None where it was not drawn."""
        path = folder / f"{self.name}.png"
        return {
            "title": self.title,
            "sentence": self.sentence(written),
            "source": _source(written),
            "picture": html.png_uri(path.read_bytes()) if path.exists() else None,
        }


def _source(written: Mapping[str, Any]) -> str:
    """The questions and pages that were looked at, and the step of the checkpoint."""
    # By the flags that analyses share; one that has neither looked at the checkpoint alone.
    settings = written["settings"]
    parts = []
    if "split" in settings:
        parts.append(f"{settings['num_questions']:,} questions of {settings['split']}")
    if "pages" in settings:
        parts.append(f"patches of {settings['pages']}")
    return ", ".join([*parts, f"step {written['step']}"]).replace("_", " ")


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of an analysis that asks questions; `check_splits` and `with_num_questions`
    fill them in."""
    parser.add_argument(
        "--split", help="whose questions are asked; default: the first of the config"
    )
    parser.add_argument("--num_questions", type=positive, help="default: the config's")


def check_splits(data: DataConfig, evaluation: EvalConfig, args: argparse.Namespace) -> None:
    """Fills in `--split` and `--pages`, where the analysis has these flags, from the config.

    Raises:
      UserError: there is no such split, or other processes of the run see other data.
    """
    defaults = {"split": evaluation.splits[0], "pages": data.validation_split}
    chosen = {flag: getattr(args, flag) or defaults[flag] for flag in defaults if flag in args}
    for flag, split in chosen.items():
        setattr(args, flag, split)
        # Opened for its error alone: which split is missing, and what is near its name.
        shards.RecordSource(data.dir, split)
    if chosen:
        contents = functools.partial(shards.contents, data.dir)
        distributed.check_alike({f"the data in {data.dir}": contents})


def with_num_questions(loaded: Loaded, args: argparse.Namespace) -> Loaded:
    """Returns the model, to be asked `--num_questions` questions where the analysis has this flag,
    which is filled in from the model's config where it is not given."""
    if "num_questions" not in args:
        return loaded
    # Not before the model is loaded: where the newest checkpoint is damaged, an older one is, and
    # the config is its own.
    args.num_questions = args.num_questions or loaded.config.eval.num_questions
    changed = dataclasses.replace(loaded.config.eval, num_questions=args.num_questions)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eval=changed))


def table(first: str, *titles: str) -> Table:
    """Returns an empty table to print; its first column is aligned left, the others, which hold
    numbers, right."""
    made = Table(box=None, padding=(0, 1, 0, 0))
    for number, title in enumerate((first, *titles)):
        made.add_column(title, justify="right" if number else "left", no_wrap=True)
    return made


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Returns the mean of values and what 5, 50 and 95 % of them lie below."""
    cuts = dict(zip(("p5", "p50", "p95"), np.percentile(values, (5, 50, 95)).tolist(), strict=True))
    return {"mean": float(values.mean()), **cuts}


def folder(loaded: Loaded) -> Path:
    """Returns where analyses of a checkpoint are written."""
    return loading.workdir_of(loaded.path) / FOLDER


def write(
    loaded: Loaded, name: str, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> Path:
    """Writes analysis/NAME.json: what was looked at, how (with the seed), and what was found.

    Returns its path.
    """
    fields = {
        "analysis": name,
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "train_seconds": loaded.metadata["train_seconds"],
        "connector": loaded.config.model.connector.name,
        "settings": dict(settings),
        **results,
    }
    # With tokens as they are spelled, and whole or not at all: a report may read it at any time.
    path = folder(loaded) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    storage.write_whole(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    return path
