"""`inspect`: what a prepared folder holds, in numbers and as a page of the rows that a model would
get; or what the patches of an image say to a trained model."""

import argparse

from alignvlm_jax import analysis, storage
from alignvlm_jax.analysis import Entry
from alignvlm_jax.commands import config_flag, usage
from alignvlm_jax.commands.config_flag import ConfigFlags
from alignvlm_jax.errors import UsageError
from alignvlm_jax.flag_types import positive

NUM_RECORDS = 8
RECORD_FLAGS = ("--record", "--filter", "--shuffle", "--num_records")


def main(argv: list[str]) -> None:
    """Runs the command: statistics and a page of packed sequences, or an analysis of a model."""
    name = _peek(argv, "--analysis")
    kind = _peek(argv, "--kind")
    # An analysis has flags of its own: its --split, for instance, means other documents than that
    # of a folder.
    if name in analysis.REGISTRY:
        args = _parse_analysis(argv, analysis.entry(name, kind))
    else:
        given, args = _parse(argv)
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.commands.work import inspect

    if name in analysis.REGISTRY:
        inspect.analyse(analysis.load(name, kind), args, argv)
    elif args.analysis:
        inspect.lens(args)
    else:
        inspect.folders(None if given.file is None else config_flag.stages(given), args)


def _parse(argv: list[str]) -> tuple[ConfigFlags, argparse.Namespace]:
    """Returns the flags of the config, and the others."""
    parser = usage.parser(
        "inspect",
        others=config_flag.flags_of_fields(),
        description=__doc__,
        epilog="Without --config the packed sequences are those of SigLIP-400M with tiles of 384 "
        f"pixels, 16,384 tokens long. {config_flag.HELP}",
    )
    parser.add_argument("--data", help="folder that `prepare` wrote; default: that of the config")
    parser.add_argument("--split", help="default: that which the stage trains on")
    parser.add_argument("--stage", default="", help="of several in the config; default: the first")
    parser.add_argument(
        "--num_sequences",
        "--num_rows",
        type=positive,
        default=8,
        help="packed sequences on the page",
    )
    parser.add_argument(
        "--out",
        type=storage.path,
        help="the page; default: rows.html, of records records.html, in the folder",
    )
    _add_record_flags(parser)
    _add_analysis_flags(parser)
    given, rest = config_flag.split(argv)
    args = parser.parse_args(rest)
    if args.analysis:
        folder = ("--split", "--stage", "--num_sequences", "--num_rows")
        fields = [flag.partition("=")[0] for flag in given.overrides]
        unused = (*folder, *RECORD_FLAGS, "--config", *fields)
        parser.check_used(argv, unused, "is of a prepared folder, and --analysis=lens reads none")
        _check_lens(args)
        return given, args
    if args.checkpoint:
        parser.error("--checkpoint=DIR needs --analysis=NAME")
    parser.check_used(argv, ("--image", "--page"), "needs --analysis=lens")
    if given.file is None and not args.data:
        parser.error(f"--data=DIR or {config_flag.USAGE} is required")
    if given.file is None:
        fields = [flag.partition("=")[0] for flag in given.overrides]
        parser.check_used(argv, ("--stage", *fields), f"needs {config_flag.USAGE}")
    # Each of two flags that choose records would be ignored by the other.
    if args.record:
        others = "chooses records, and --record=ID names them: leave one of them out"
        parser.check_used(argv, ("--filter", "--shuffle", "--num_records"), others)
    if args.record or args.filter or args.shuffle is not None or args.num_records is not None:
        sequences = "is of packed sequences, and the other flags ask for records"
        parser.check_used(argv, ("--num_sequences", "--num_rows"), sequences)
        args.num_records = args.num_records or NUM_RECORDS
    return given, args


def _add_record_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "records, their pages with word boxes, patch labels and answers"
    )
    group.add_argument(
        "--record", action="append", metavar="ID", help="record of this id; may be given again"
    )
    group.add_argument(
        "--filter",
        default="",
        metavar="TEXT",
        help="records that have this in their id, source, words, questions or answers",
    )
    # Without a value any order will do, so long as it is the same one each time.
    group.add_argument(
        "--shuffle",
        nargs="?",
        type=positive,
        const=1,
        metavar="SEED",
        help="records in another order; another seed shows others",
    )
    group.add_argument(
        "--num_records",
        type=positive,
        help=f"records on the page, the first ones without another flag; default: {NUM_RECORDS}",
    )


def _add_analysis_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("analyses of a trained model")
    helps = "; ".join(f"{name}: {one.help}" for name, one in analysis.REGISTRY.items())
    group.add_argument(
        "--analysis",
        choices=sorted({"lens", *analysis.REGISTRY}),
        help=f"lens: what the patches of an image say; {helps}. Each has a --help of its own",
    )
    group.add_argument(
        "--checkpoint", type=storage.path, help="workdir, or one of its checkpoints/STEP"
    )
    group.add_argument(
        "--image",
        type=storage.path,
        help="lens: a PNG, JPEG, ... or PDF file; --out is lens.html in the workdir, or a .png",
    )
    group.add_argument("--page", type=int, default=1, help="lens: page of a PDF, from 1")


def _peek(argv: list[str], flag: str) -> str | None:
    """Returns the value of a flag, before it is known which other flags there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A flag without its value is left to the real parser, whose message is better.
    parser.add_argument(flag, nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


def _parse_analysis(argv: list[str], chosen: Entry) -> argparse.Namespace:
    """Returns the parsed flags of the chosen analysis; those of others are wrong usage."""
    parser = usage.parser("inspect", description=f"Analysis: {chosen.help}.")
    parser.add_argument("--analysis", choices=analysis.REGISTRY)
    parser.add_argument(
        "--checkpoint", type=storage.path, help="workdir, or one of its checkpoints/STEP"
    )
    parser.add_argument("--data", help="folder that `prepare` wrote; default: the one trained on")
    chosen.add_flags(parser)
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        parser.error(f"--analysis={args.analysis} needs --checkpoint=DIR")
    usage.check_run(args.checkpoint)
    usage.check_workdir(args.checkpoint, "inspect")
    return args


def _check_lens(args: argparse.Namespace) -> None:
    """Raises UserError where a flag of the lens is missing or names nothing."""
    if not args.checkpoint:
        raise UsageError("--analysis=lens needs --checkpoint=DIR")
    if not args.image:
        raise UsageError("--analysis=lens needs --image=FILE")
    usage.check_exists("image", args.image)
    usage.check_run(args.checkpoint)
    if not args.out:
        usage.check_workdir(args.checkpoint, "inspect without --out=FILE")
    usage.check_image(args.image, args.page)
