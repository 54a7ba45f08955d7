"""`compare`: measures the runs of a comparison and writes their tables, pictures and report."""

import argparse
import signal
import sys

from alignvlm_jax import storage
from alignvlm_jax.commands import usage
from alignvlm_jax.errors import StoppedError, UserError, nearest


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
      UserError: a run is not finished, two runs of a table have different questions, or two of a
        row differ in more than the seed; nothing is measured then.
    """
    args = _parse(argv)
    # Only now: what is misspelt should be answered before all of this is imported.
    from rich.console import Console

    from alignvlm_jax.report import compare, compare_figures, compare_tables

    # Raises before anything is measured where a run is not finished.
    runs = compare.find(args.workdir)
    rows = {compare.row_of(run) for run in runs}
    if args.baseline and args.baseline not in rows:
        raise UserError(
            f"there is no row {args.baseline!r} in {args.workdir}{nearest(args.baseline, rows)}"
        )
    # Raises for a document without a place for tables now, not after hours of measuring.
    if args.document:
        compare_tables.split(args.document, args.place)
    try:
        for number, run in enumerate(runs, start=1):
            if not compare.is_measured(run):
                print(f"{number} of {len(runs)}: {run}", file=sys.stderr)
                compare.measure(run)
    except KeyboardInterrupt as err:
        why = "stopped; the same command goes on, and asks no question again"
        raise StoppedError(why, signal.SIGINT) from err
    tables = compare.read(runs)
    if args.baseline:
        tables = compare.with_baseline(tables, args.baseline)
    text = compare_tables.markdown(tables)
    console = Console(highlight=False, soft_wrap=True)
    console.print(text, markup=False)
    storage.write_whole(args.workdir / "comparison.md", text + "\n")
    if args.document:
        compare_tables.put(args.document, text, args.place)
        console.print(f"Written: {args.document}", markup=False)
    console.print(f"Written: {compare_figures.build(tables, args.workdir)}", markup=False)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = usage.parser(
        "compare",
        description="Evaluates runs named TABLE/ROW_seedN, asks them through noise and with fewer "
        "words, and compares. What is measured already stays; the same command goes on after "
        "Ctrl-C.",
    )
    parser.add_argument(
        "--workdir", required=True, type=storage.path, help="folder of the runs' folders"
    )
    parser.add_argument(
        "--document", type=storage.path, help="a Markdown file with a marked place for the tables"
    )
    parser.add_argument(
        "--place",
        default="make compare",
        help="NAME of that place, between the lines <!-- NAME --> and <!-- end of NAME -->; "
        "default: make compare",
    )
    parser.add_argument(
        "--baseline", help="TABLE/ROW that stands in other tables of the same questions, too"
    )
    args = parser.parse_args(argv)
    usage.check_exists("folder of runs", args.workdir)
    if not storage.is_bucket(args.workdir) and not any(args.workdir.glob("*/*_seed*")):
        # As `compare.find`, which imports jax first.
        raise UserError(f"{args.workdir} has no runs named TABLE/ROW_seedN")
    return args
