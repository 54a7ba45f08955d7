"""What `evaluate` does once its flags are read."""

import argparse
import contextlib
import dataclasses
import functools
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from alignvlm_jax import logs, storage
from alignvlm_jax.benchmarks import predictions, questions, runner, summary, tasks, text_bpb
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.benchmarks.scores.task import LEFT_OUT
from alignvlm_jax.commands.evaluate import BENCHMARKS
from alignvlm_jax.config import EvalConfig
from alignvlm_jax.data import prepared, shards
from alignvlm_jax.errors import StoppedError, UserError, counted
from alignvlm_jax.inference import loading
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.logs import HostLog
from alignvlm_jax.parallel import compile_cache, distributed
from alignvlm_jax.train import checkpoint as checkpoint_lib
from alignvlm_jax.train import commit


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Evaluates a model on splits or tasks, writes what it answered, and prints tables.

    Args:
      args: the flags.
      argv: the command's arguments, which must be the same on all processes.

    Raises:
      UserError: there is no such checkpoint, split or data.
    """
    # Before jax is asked for devices: after that, this process could no longer join the others.
    distributed.initialize(argv)
    workdir = loading.workdir_of(args.checkpoint)
    with _logged(workdir), compile_cache.kept_in(workdir):
        if args.tasks:
            _evaluate_tasks(args)
        else:
            _evaluate_splits(args)


def _evaluate_splits(args: argparse.Namespace) -> None:
    """Evaluates the model on splits, with pages and with blank ones, and prints a table."""
    config = loading.load_config(args.checkpoint, args.data)
    data_dir = config.data.dir
    for split in _with_flags(config.eval, args).splits:
        # A misspelt split should not wait for the model.
        try:
            shards.RecordSource(data_dir, split)
        except shards.NoSplit as err:
            hint = "" if args.splits else ", which the config names; others: --splits=NAMES"
            raise UserError(f"{err}{hint}") from err
    contents = functools.partial(prepared.contents, data_dir)
    distributed.check_alike({f"the data in {data_dir}": contents})
    loaded = loading.load(args.checkpoint, config)
    # Of the checkpoint that was read; the newest, whose config was read above, may be damaged.
    evaluation = _with_flags(loaded.config.eval, args)
    evaluator = runner.Runner(loaded, evaluation)
    if distributed.is_main():
        _say_what_is_left_out(loaded, evaluation, is_own=args.data is None)
    with _stoppable():
        for split in evaluation.splits:
            # What is right on a blank page was guessed from the question alone.
            for blind in (False, True):
                evaluator.evaluate(split, blind)
    if not distributed.is_main():
        return
    results = _summarize(loaded)
    console = Console(highlight=False)
    console.print(f"{loaded.path}: connector {loaded.config.model.connector.name}")
    console.print(_table(evaluation.splits, results))
    for split in evaluation.splits:
        _say_what_is_cut(console, split, results[split, False])
    _print_written(console, args.checkpoint)


def _say_what_is_left_out(loaded: Loaded, evaluation: EvalConfig, *, is_own: bool) -> None:
    """Says where fewer questions are asked than a split has, and where the data (`is_own`: those of
    the run) are no longer those that it was trained on."""
    data = loaded.config.data
    for split in evaluation.splits:
        count = len(shards.RecordSource(data.dir, split))
        if evaluation.num_questions and evaluation.num_questions < count:
            logs.say(
                f"{split}: {counted(evaluation.num_questions, 'question')} of {count:,} records; "
                "--num_questions=N asks N"
            )
    # A folder that was prepared anew may hold out others, and train's pages be among its questions.
    if is_own and prepared.is_anew(loaded.metadata.get("data"), *data.folders):
        logs.say(
            f"{', '.join(data.folders)} was prepared anew since {loaded.path} was trained: what is "
            "evaluated here may have been trained on"
        )


def _evaluate_tasks(args: argparse.Namespace) -> None:
    """Evaluates the model on benchmarks and held-out texts, and prints tables."""
    chosen = tasks.find(args.tasks.split(","))
    # The data of all tasks are opened before the model is loaded: a missing folder should not be
    # found after hours.
    data = BENCHMARKS if args.data is None else storage.path(args.data)
    opened = [_open(task, data, args.num_questions) for task in chosen]
    distributed.check_alike(
        {
            f"the data of {one.task.name}": functools.partial(prepared.contents, one.directory)
            for one in opened
        }
    )
    config = loading.load_config(args.checkpoint)
    loaded = loading.load(args.checkpoint, config)
    evaluator = runner.Runner(loaded)
    reader = text_bpb.Reader(loaded)
    results = {}
    with _stoppable():
        for one in opened:
            measure = (
                reader.measure if isinstance(one, text_bpb.HeldOut) else evaluator.evaluate_task
            )
            results[one.task.name] = measure(one)
    if not distributed.is_main():
        return
    _summarize(loaded)
    console = Console(highlight=False)
    for task in chosen:
        if isinstance(task, tasks.TextTask):
            _say_what_was_read(console, task, results[task.name])
        else:
            _hand_in(console, args.checkpoint, task, results[task.name])
    console.print(f"{loaded.path}: connector {loaded.config.model.connector.name}", soft_wrap=True)
    console.print(summary.task_table(chosen, results))
    if not all(isinstance(task, tasks.TextTask) for task in chosen):
        console.print(summary.paper_table(results))
    _print_written(console, args.checkpoint)


def _logged(workdir: Path) -> contextlib.AbstractContextManager:
    """Returns the host's log of a workdir; a null context if the folder is no workdir."""
    # Else a misspelt name would create a folder.
    if not (workdir / checkpoint_lib.FOLDER).is_dir():
        return contextlib.nullcontext()
    ranks = {"process": jax.process_index(), "num_processes": jax.process_count()}
    return HostLog(workdir, **ranks, commit=commit.git_hash())


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A context in which Ctrl-C becomes a message that the command can be resumed."""
    try:
        yield
    except KeyboardInterrupt as err:
        why = "stopped; the same command goes on with what is left"
        raise StoppedError(why, signal.SIGINT) from err


def _summarize(loaded: Loaded) -> dict[tuple[str, bool], Predictions]:
    """Writes summary.json and returns the predictions on splits that are in it.

    Earlier predictions on other splits or tasks count as well, if they are of the same checkpoint
    and (those on splits) of the same data; of a split's blank pages also only if they are of the
    same questions as those with pages, which `summary.summarize` sees to.
    """
    workdir = loading.workdir_of(loaded.path)
    # To the microsecond: it identifies the checkpoint, wherever its folder lies now.
    trained = loaded.metadata["train_seconds"]
    data = prepared.fingerprint(loaded.config.data.dir)
    results = {
        key: result
        for key, result in predictions.read_all(workdir).items()
        if (result.header["train_seconds"], result.header.get("data")) == (trained, data)
    }
    of_tasks = {
        name: result
        for name, result in predictions.read_tasks(workdir).items()
        if result.header["train_seconds"] == trained
    }
    summary.write(workdir, summary.summarize(loaded, loaded.config.eval.splits, results, of_tasks))
    return results


def _open(
    task: tasks.Task | tasks.TextTask, data: Path, count: int | None
) -> questions.Benchmark | text_bpb.HeldOut:
    open_task = text_bpb.open_text if isinstance(task, tasks.TextTask) else questions.open_benchmark
    return open_task(task, data, count)


def _say_what_was_read(console: Console, task: tasks.TextTask, result: Predictions) -> None:
    """Prints how many records have no text, and whether windows are shorter than usual."""
    if problems := result.problems():
        console.print(
            f"{task.name}: {len(problems):,} of {len(result.rows):,} records have no text and are "
            f"left out; the first: {problems[0]}",
            soft_wrap=True,
        )
    if (window := result.header["window"]) < task.window:
        console.print(
            f"{task.name}: the model's rows hold {window:,} tokens, so that windows are shorter "
            f"than the usual {task.window:,}: a value to compare with those of such windows only",
            soft_wrap=True,
        )


def _hand_in(console: Console, checkpoint: Path, task: tasks.Task, result: Predictions) -> None:
    """Prints how many questions could not be asked, or scored; writes a submission if answers are
    secret."""
    if problems := result.problems():
        console.print(
            f"{task.name}: {len(problems):,} of {len(result.rows):,} questions cannot be asked "
            f"and score 0; the first: {problems[0]}",
            soft_wrap=True,
        )
    _say_what_is_cut(console, task.name, result)
    totals = result.statistics()
    if count := totals.sums.get(LEFT_OUT):
        console.print(
            f"{task.name}: {count:,.0f} of {totals.weights[LEFT_OUT]:,.0f} are left out of "
            f"the scores: {task.leaves_out}",
            soft_wrap=True,
        )
    # Test splits are published without answers: these are empty lists then.
    if not all(row["answers"] for row in result.rows):
        path = predictions.task_path(loading.workdir_of(checkpoint), task.name).with_suffix(
            ".submission.json"
        )
        predictions.write_submission(path, result, task)
        console.print(
            f"{task.name}: answers are not known; {path} can be handed in", soft_wrap=True
        )


def _print_written(console: Console, checkpoint: Path) -> None:
    workdir = loading.workdir_of(checkpoint)
    console.print(
        f"Written to {workdir / predictions.DIRECTORY} and {workdir / summary.FILE}", soft_wrap=True
    )


def _with_flags(evaluation: EvalConfig, args: argparse.Namespace) -> EvalConfig:
    """Returns the settings of evaluation with the splits and the number of questions of the
    flags."""
    splits = tuple(args.splits.split(",")) if args.splits else evaluation.splits
    num_questions = args.num_questions or evaluation.num_questions
    return dataclasses.replace(evaluation, splits=splits, num_questions=num_questions)


def _table(splits: Sequence[str], results: Mapping[tuple[str, bool], Predictions]) -> Table:
    """Returns a table of the scores by split, and under each by kind of document; with the
    character error rate where some questions were to transcribe a page."""
    table = Table("documents", box=None)
    has_cer = any(results[split, False].character_error_rate() is not None for split in splits)
    for title in ("questions", "ANLS", "exact match", "ANLS blind", *["CER"] * has_cer):
        table.add_column(title, justify="right")
    for split in splits:
        seen = results[split, False]
        blind = results[split, True]
        table.add_row(split, *_cells(seen, blind, has_cer), style="bold")
        for kind in seen.kinds():
            of_kind = _cells(seen.of_kind(kind), blind.of_kind(kind), has_cer)
            table.add_row(f"  {kind}", *of_kind)
    return table


def _cells(seen: Predictions, blind: Predictions, has_cer: bool) -> list[str]:
    scores = [seen.mean("score"), seen.mean("exact"), blind.mean("score")]
    if has_cer:
        scores.append(seen.character_error_rate())
    shown = ["-" if score is None else f"{score:.3f}" for score in scores]
    return [str(len(seen.rows)), *shown]


def _say_what_is_cut(console: Console, name: str, result: Predictions) -> None:
    """Prints how many answers had not come to their end, and are scored as they are."""
    if count := result.num_cut():
        limit = result.header["decoding"]["max_new_tokens"]
        console.print(
            f"{name}: {count:,} of {len(result.rows):,} answers were cut at "
            f"max_new_tokens={limit}, and are scored as they are",
            soft_wrap=True,
        )
