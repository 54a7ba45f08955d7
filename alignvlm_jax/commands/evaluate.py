"""`evaluate`: asks a trained model about documents that it never saw, with their pages and with
blank ones; or the questions of benchmarks, or how well its language model alone predicts text."""

import argparse
from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.benchmarks import tasks
from alignvlm_jax.commands import usage
from alignvlm_jax.errors import UsageError
from alignvlm_jax.flag_types import positive

BENCHMARKS = Path("data")
"""Default folder of the data of --tasks, where `make demo` and `make data` write theirs."""


def main(argv: list[str]) -> None:
    args = _parse(argv)
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.commands.work import evaluate

    evaluate.run(args, argv)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = usage.parser("evaluate", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=storage.path,
        required=True,
        help="workdir, or one of its checkpoints/STEP",
    )
    parser.add_argument("--splits", help="separated by commas; default: those of the config")
    names = ", ".join(tasks.NAMES)
    parser.add_argument(
        "--tasks", help=f"benchmarks, separated by commas, in the place of splits: {names}"
    )
    parser.add_argument(
        "--num_questions",
        type=positive,
        help="questions a split or task, or records of a text; default: the config's, and all of "
        "a task",
    )
    parser.add_argument(
        "--data",
        help="folder that `prepare` wrote; default: the one trained on. With --tasks, the folder "
        f"that holds such a folder for each task; default: {BENCHMARKS}",
    )
    args = parser.parse_args(argv)
    if "" in (args.tasks, args.splits):
        raise UsageError("--tasks and --splits need names, separated by commas")
    if args.tasks and args.splits:
        raise UsageError("--tasks and --splits exclude each other: the demo's splits are tasks too")
    if args.tasks:
        # For its error: which of the names is unknown.
        tasks.find(args.tasks.split(","))
    usage.check_run(args.checkpoint)
    usage.check_workdir(args.checkpoint, "evaluate")
    return args
