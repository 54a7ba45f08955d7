"""`evaluate`: asks a trained model about documents that it never saw, with their pages and with blank ones."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alignvlm_jax.commands.arguments import positive
from alignvlm_jax.config import Config
from alignvlm_jax.data import sources
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import loading, predictions, runner, summary
from alignvlm_jax.eval.predictions import Predictions


def main(argv: list[str]) -> None:
    args = _parse(argv)
    config = _asked(loading.load_config(args.checkpoint, args.data), args)
    for split in config.eval.splits:
        sources.RecordSource(config.data.dir, split)  # A misspelt split should not wait for the model.
    loaded = loading.load(args.checkpoint, config)
    config = _asked(loaded.config, args)
    asker = runner.Runner(loaded, config)
    try:
        for split in config.eval.splits:
            for blind in (False, True):
                asker.evaluate(split, blind)
    except KeyboardInterrupt as err:
        raise UserError("stopped; the same command goes on with the questions that are left") from err
    workdir = loading.workdir_of(args.checkpoint)
    # An earlier evaluation of other splits still counts, if it was of this very checkpoint on these very documents.
    ours = loaded.metadata["train_seconds"], sources.fingerprint(config.data.dir)
    results = {
        key: result
        for key, result in predictions.read_all(workdir).items()
        if (result.header["train_seconds"], result.header.get("data")) == ours
    }
    summary.write(workdir, summary.summarize(loaded, loaded.config.eval.splits, results))
    console = Console(highlight=False)
    console.print(f"{loaded.path}: connector {config.model.connector.name}")
    console.print(_table(config.eval.splits, results))
    console.print(f"Written to {workdir / predictions.DIRECTORY} and {workdir / summary.FILE}", soft_wrap=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alignvlm_jax evaluate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="workdir, or one of its checkpoints/STEP")
    parser.add_argument("--splits", help="separated by commas; default: those of the config")
    parser.add_argument("--num_questions", type=positive, help="questions a split; default: that of the config")
    parser.add_argument("--data", help="folder that `prepare` wrote; default: the one trained on")
    return parser.parse_args(argv)


def _asked(config: Config, args: argparse.Namespace) -> Config:
    """`config` with what the flags ask for."""
    splits = tuple(args.splits.split(",")) if args.splits else config.eval.splits
    num_questions = args.num_questions or config.eval.num_questions
    asked = dataclasses.replace(config.eval, splits=splits, num_questions=num_questions)
    return dataclasses.replace(config, eval=asked)


def _table(splits: Sequence[str], results: Mapping[tuple[str, bool], Predictions]) -> Table:
    """Scores by split, and under each by kind of document."""
    table = Table("documents", box=None)
    for title in ("questions", "ANLS", "exact match", "ANLS blind"):
        table.add_column(title, justify="right")
    for split in splits:
        seen, blind = results[split, False], results[split, True]
        table.add_row(split, *_cells(seen, blind), style="bold")
        for kind in seen.kinds():
            table.add_row(f"  {kind}", *_cells(seen.of_kind(kind), blind.of_kind(kind)))
    return table


def _cells(seen: Predictions, blind: Predictions) -> list[str]:
    scores = (seen.mean("score"), seen.mean("exact"), blind.mean("score"))
    return [str(len(seen.rows)), *(f"{score:.3f}" for score in scores)]
