"""The interface of analyses of a trained model, and what they share: tables and files."""

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
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.config import Config, DataConfig, EvalConfig
from alignvlm_jax.data import prepared, shards
from alignvlm_jax.data.record import Record
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.parallel import distributed
from alignvlm_jax.pictures import html

FOLDER = "analysis"


class Analysis(Protocol):
    """An analysis of a trained model.

    `inspect --analysis=NAME` runs it, and the report of the workdir shows it; its flags, and what
    --help says of it, stand in the registry. In the methods below
    `found` is the result of `measure`, plain values that JSON holds, and `written` is the content
    of the file NAME.json: `found`, the "settings", and the description of the checkpoint that
    `write` adds.

    Attributes:
      name: stem of the files analysis/NAME.json and NAME.png.
      title: heading of its section of the report.
      needs_distribution: whether it reads the patches' distribution over the vocabulary. Such an
        analysis is refused for connectors without one.
      needs_token_per_patch: whether it compares visual tokens by what their patches show. It is
        refused for connectors that merge patches.
    """

    name: str
    title: str
    needs_distribution: bool = False
    needs_token_per_patch: bool = False

    def kinds(self) -> Mapping[str, "Analysis"]:
        """Returns the kinds of this analysis by their name for `--kind`, this one first.

        An analysis without kinds returns an empty mapping, and has no such flag.
        """
        return {}

    def check(self, config: Config, args: argparse.Namespace) -> None:
        """Checks the flags of this analysis against the model's config.

        It runs after `check_splits` and before the model is loaded, which takes long.

        Raises:
          UserError: a flag does not fit.
        """

    @abc.abstractmethod
    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        """Returns the result of the analysis; all processes call it together."""

    @abc.abstractmethod
    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints the result as tables."""

    @abc.abstractmethod
    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of the result for a model with this connector."""

    @abc.abstractmethod
    def sentence(self, written: Mapping[str, Any]) -> str:
        """Returns a sentence with the main numbers, for the report."""

    def section(
        self, folder: Path, written: Mapping[str, Any], of_data: str = ""
    ) -> dict[str, Any]:
        """Returns the values that the template of the report shows.

        The picture is NAME.png in `folder`, where NAME.json lies, or None if it was not drawn.
        `of_data` is " of FOLDER" where that was looked at and is none of the run's.
        """
        path = folder / f"{self.name}.png"
        return {
            "title": self.title,
            "sentence": self.sentence(written),
            "source": _source(written, of_data),
            "picture": html.png_uri(path.read_bytes()) if path.exists() else None,
        }


def _source(written: Mapping[str, Any], of_data: str) -> str:
    """Returns which questions, pages and checkpoint an analysis was made of, in words."""
    # By the flags that analyses share: with neither, it is an analysis of the checkpoint alone.
    settings = written["settings"]
    parts = []
    if "split" in settings:
        parts.append(f"{settings['num_questions']:,} questions of {settings['split']}")
    if "pages" in settings:
        parts.append(f"patches of {settings['pages']}")
    # Folders keep their names as they are.
    sources = [part.replace("_", " ") + of_data for part in parts]
    return ", ".join([*sources, f"step {written['step']}"])


def check_splits(data: DataConfig, evaluation: EvalConfig, args: argparse.Namespace) -> None:
    """Fills in `--split` and `--pages` from the config, if the analysis has these flags.

    Raises:
      UserError: there is no such split, or other processes of the run see other data.
    """
    defaults = {"split": evaluation.splits[0], "pages": data.validation_split}
    chosen = {flag: getattr(args, flag) or defaults[flag] for flag in defaults if flag in args}
    for flag, split in chosen.items():
        setattr(args, flag, split)
        # Opened for its error alone: which split is missing, and what is near its name.
        shards.RecordSource(data.dir, split)
    # An analysis that reads no data has nothing to compare between processes.
    if chosen:
        contents = functools.partial(prepared.contents, data.dir)
        distributed.check_alike({f"the data in {data.dir}": contents})


def with_num_questions(loaded: Loaded, args: argparse.Namespace) -> Loaded:
    """Returns the model with `--num_questions` in its config, if the analysis has this flag.

    A flag that is not given is filled in from the model's config.
    """
    if "num_questions" not in args:
        return loaded
    # Only now: if the newest checkpoint is damaged, an older one was loaded, and the config is that
    # of the loaded one.
    args.num_questions = args.num_questions or loaded.config.eval.num_questions
    changed = dataclasses.replace(loaded.config.eval, num_questions=args.num_questions)
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, eval=changed))


def scores(result: Predictions) -> dict[str, Any]:
    """Returns the mean scores of predictions, and their number."""
    return {
        "anls": result.mean("score"),
        "exact_match": result.mean("exact"),
        "num_eval": len(result.rows),
    }


def pages(loaded: Loaded, split: str, count: int) -> list[Record]:
    """Returns at most `count` records of a split, spread evenly over it; UserError where there is
    no such split."""
    records = shards.RecordSource(loaded.config.data.dir, split)
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def table(first: str, *titles: str) -> Table:
    """Returns an empty table to print, with a left-aligned first column and columns of numbers."""
    made = Table(box=None, padding=(0, 1, 0, 0))
    for number, title in enumerate((first, *titles)):
        # On a narrow terminal a title of several words takes several lines; numbers have no spaces.
        made.add_column(title, justify="right" if number else "left", no_wrap=not number)
    return made


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Returns the mean and the 5th, 50th and 95th percentile of values [n]."""
    cuts = dict(zip(("p5", "p50", "p95"), np.percentile(values, (5, 50, 95)).tolist(), strict=True))
    return {"mean": float(values.mean()), **cuts}


def folder(loaded: Loaded) -> Path:
    """Returns the folder of the analyses of a checkpoint, in its workdir."""
    return loading.workdir_of(loaded.path) / FOLDER


def write(
    loaded: Loaded, name: str, settings: Mapping[str, Any], results: Mapping[str, Any]
) -> Path:
    """Writes the file analysis/NAME.json and returns its path.

    Args:
      loaded: the model, whose checkpoint is described.
      name: name of the analysis.
      settings: its flags, with the seed.
      results: the result of `Analysis.measure`.
    """
    fields = {
        "analysis": name,
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "train_seconds": loaded.metadata["train_seconds"],
        "connector": loaded.config.model.connector.name,
        "settings": dict(settings),
        **_data(loaded, settings),
        **results,
    }
    # In one step, since a report may read it at any time. Without ensure_ascii tokens stay legible.
    path = folder(loaded) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    storage.write_whole(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
    return path


def _data(loaded: Loaded, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the folder of the data that an analysis with these flags was made of, and its
    fingerprint, as headers of predictions have them; empty if it reads none."""
    # What reads no data has to work where they are gone.
    if not {"split", "pages"} & set(settings):
        return {}
    folder = loaded.config.data.dir
    return {"folder": str(folder), "data": prepared.fingerprint(folder)}
