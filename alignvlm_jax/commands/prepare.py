"""`prepare`: data sets, your own documents or rendered ones to shards that training reads."""

import argparse
import dataclasses
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.commands import next_commands, usage
from alignvlm_jax.errors import StoppedError, UsageError, nearest
from alignvlm_jax.flag_types import names, positive
from alignvlm_jax.ingest.formats import REGISTRY, survey
from alignvlm_jax.storage import faults

DOCUMENTS = "documents"
CROPS = "crops"
DRAWN = {
    DOCUMENTS: "draws the demonstration's, without a source",
    CROPS: "draws a reader's lines and tables with the text of prepared pages, and cuts out theirs",
}
"""The formats of records that are drawn."""
TOKENIZER_HINT = (
    "`make weights` gives weights/smollm2/tokenizer; the demonstration's is "
    "data/demo/tokenizer.model"
)


def main(argv: list[str]) -> None:
    argv, beam_flags = _split(argv)
    args = _parse(argv)
    if storage.is_bucket(storage.path(args.out)):
        raise UsageError(
            f"--out={args.out} is in a bucket, and prepare writes to a disk; copy the folder there "
            "when it is complete: gcloud storage cp --recursive FOLDER gs://BUCKET/NAME"
        )
    # Rendered documents have no such flag: they are made on this machine.
    if beam_flags and not getattr(args, "beam_runner", ""):
        raise UsageError(
            f"{beam_flags[0]} comes after --, where flags of Apache Beam stand: name a "
            "--beam_runner"
        )
    _check(args)
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.commands.work import prepare

    try:
        if args.recount:
            prepare.recount(args)
        elif args.format in DRAWN:
            prepare.drawn(args)
        else:
            prepare.source(args, beam_flags)
    except OSError as err:
        raise faults.as_error(
            f"cannot write {args.out}: {err.strerror or err}; the same command goes on", err
        ) from err
    except KeyboardInterrupt as err:
        why = "stopped; the same command goes on with what is done"
        raise StoppedError(why, signal.SIGINT) from err


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the flags of this command, and those of Apache Beam, which follow `--`."""
    # argparse would take what follows `--` for positional arguments.
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _parse(argv: list[str]) -> argparse.Namespace:
    """Returns the parsed flags, which depend on --format; those of other formats are refused."""
    chosen = _peek(argv)
    name = chosen.format or ("" if chosen.source else DOCUMENTS)
    parser = usage.parser(
        "prepare",
        # What makes it another format than the demonstration's.
        others=("--source", "--tokenizer"),
        description=_description(chosen.format),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--format",
        default=name,
        choices=[*DRAWN, *REGISTRY],
        help="kind of data; without it --source is looked through",
    )
    parser.add_argument(
        "--recount", action="store_true", help="only count the tokens of --out anew, by --tokenizer"
    )
    # Of a source there is no default: it would take the place of the demonstration's data.
    parser.add_argument(
        "--out",
        default="data/demo" if name == DOCUMENTS or chosen.recount else "",
        help="folder to write",
    )
    if chosen.recount:
        parser.add_argument("--tokenizer", help="file, or folder that holds it")
        return parser.parse_args(argv)
    parser.add_argument(
        "--overwrite", action="store_true", help="write --out anew where other flags made it"
    )
    parser.add_argument(
        "--num_workers", type=positive, default=2, help="processes; changes no byte of the data"
    )
    if name in DRAWN:
        _add_drawn_flags(parser, name)
        return parser.parse_args(argv)
    if not name:
        found = survey.survey(chosen.source, chosen.out)
        out = chosen.out or _own_folder(chosen.source)
        if not any(flag.startswith("--tokenizer") for flag in chosen.rest):
            chosen.rest.append(f"--tokenizer={next_commands.DEFAULT_CHECKPOINT}/tokenizer")
        name = found.format(next_commands.command("prepare"), out, shlex.join(chosen.rest))
        print(f"{found}\n--format={name}: {REGISTRY[name].about}")
        parser.set_defaults(format=name)
    _add_source_flags(parser, name)
    single = not chosen.format and name == "pdf" and found.by_format["pdf"] == 1
    if single:
        # Nothing else could be held out.
        parser.set_defaults(holdout_by="page")
    args = parser.parse_args(argv)
    if args.split and args.holdout:
        parser.check_used(argv, ("--holdout",), f"holds out, and --split={args.split} takes all")
    if not is_grouped(args):
        needs = "needs --group_by_image, which --split leaves out where it is not given"
        parser.check_used(argv, ("--group_tokens",), needs)
    if args.beam_runner:
        parser.check_used(
            argv, ("--num_workers",), "is of this machine, and --beam_runner is given"
        )
    if single and args.holdout_by == "page" and args.holdout and not args.split:
        print("--holdout_by=page: pages of a single PDF are held out")
    return args


def _peek(argv: list[str]) -> argparse.Namespace:
    """Returns the flags on which it depends what other flags there are."""
    # Without --help, which the real parser has to answer, and without an opinion about values.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recount", action="store_true")
    for flag in ("--format", "--source", "--out"):
        parser.add_argument(flag, nargs="?", default="")
    chosen, rest = parser.parse_known_args(argv)
    chosen.rest = rest
    # A flag without its value is left to the real parser, whose message is better.
    chosen.format = chosen.format or ""
    is_given = any(flag.partition("=")[0] == "--source" for flag in argv)
    if chosen.source is None or (is_given and not chosen.source):
        raise UsageError("--source needs a value: a file or folder, on this machine or gs://")
    if chosen.format not in ("", *DRAWN, *REGISTRY):
        known = [*DRAWN, *REGISTRY]
        raise UsageError(f"--format is {chosen.format!r}{nearest(chosen.format, known)}")
    # The list of all formats is shown before any source is read.
    if {"-h", "--help"} & {*rest}:
        chosen.source = ""
    return chosen


def _description(name: str) -> str:
    """Returns what --help shows before the flags: of a format its schema, else all formats."""
    if name in REGISTRY:
        return f"--format={name}: {REGISTRY[name].about}\n\n{REGISTRY[name].schema}"
    lines = [f"  {name:15}{kind.about}" for name, kind in REGISTRY.items()]
    return "\n".join(
        [
            __doc__,
            "",
            "Formats of a --source; without --format it is looked through, and what reads it is "
            "taken:",
            *lines,
            *(f"  {name:15}{about}" for name, about in DRAWN.items()),
            "",
            "Of every --source: --out, --tokenizer, --holdout, --split, --num_workers; more depend "
            "on the format:",
            "`prepare --format=NAME --help` shows all, the schema of its files and an example.",
            f"Below are those of --format={DOCUMENTS}.",
        ]
    )


def _add_drawn_flags(parser: argparse.ArgumentParser, name: str) -> None:
    num_train, num_eval = (16_000, 512) if name == DOCUMENTS else (20_000, 500)
    helps = "records of each training split"
    parser.add_argument("--num_train", type=positive, default=num_train, help=helps)
    helps = "records of each evaluation split"
    parser.add_argument("--num_eval", type=positive, default=num_eval, help=helps)
    parser.add_argument("--seed", type=_within(int, 0), default=0)
    if name == CROPS:
        helps = "folder of pages to train on, as --format=pdf --questions=none --dpi=100 writes it"
        parser.add_argument("--source", required=True, help=helps)
        helps = "folder of pages of other documents, for what is measured"
        parser.add_argument("--unseen", required=True, help=helps)
        return
    helps = "strength of scan noise; 1 is a bad scan"
    parser.add_argument("--noise", type=_within(float, 0), default=0.0, help=helps)


def _add_source_flags(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--source", required=True, help="file or folder, on this machine or gs://")
    parser.add_argument(
        "--tokenizer", help=f"file or folder; it is copied to --out. {TOKENIZER_HINT}"
    )
    parser.add_argument(
        "--holdout",
        type=_within(float, 0, 1),
        default=0.02,
        help="fraction of documents for the validation split",
    )
    parser.add_argument(
        "--split",
        default="",
        type=_split_name,
        help="put all into a split of this name, for `evaluate --tasks`; questions without an "
        "answer then stay",
    )
    optional = argparse.BooleanOptionalAction
    helps = "one record for questions about one image, and no copies; default: unless --split"
    parser.add_argument("--group_by_image", action=optional, help=helps)
    helps = "text tokens that such a record may have"
    parser.add_argument("--group_tokens", type=positive, default=1024, help=helps)
    helps = "smallest number of records of a shard, but for the last one"
    parser.add_argument("--shard_records", type=positive, default=1000, help=helps)
    helps = "prepared FOLDER or FOLDER:SPLIT whose images no record may show; several by commas"
    parser.add_argument("--exclude", type=names, action="extend", default=[], help=helps)
    helps = "read images outside of --source and of the folder that their paths start from"
    parser.add_argument("--allow_outside", action="store_true", help=helps)
    parser.add_argument(
        "--beam_runner",
        default="",
        help="run under Apache Beam (requirements-beam.txt), with --out on a disk that all "
        "workers see; Beam's own flags follow after --",
    )
    # A field of a format is a flag of its default's type; bool() would take "False" for true.
    for field in dataclasses.fields(REGISTRY[name]):
        flag = {"action": argparse.BooleanOptionalAction} if isinstance(field.default, bool) else {}
        flag = flag or {"type": type(field.default)}
        parser.add_argument(
            f"--{field.name}", default=field.default, help=field.metadata["help"], **flag
        )


def _within(kind: type, minimum: float, maximum: float = float("inf")) -> Callable[[str], float]:
    """Returns a type of flags: a number of this kind from `minimum` to `maximum`."""

    def number(text: str) -> float:
        value = kind(text)
        # Written so that NaN is refused: it compares with nothing.
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not from {minimum} to {maximum}")
        return value

    number.__name__ = kind.__name__  # argparse shows it in the error for what is no number
    return number


def _split_name(text: str) -> str:
    """Returns the name of a split, which may have only letters, digits and _."""
    if not re.fullmatch(r"\w*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of letters, digits and _")
    return text


def is_grouped(args: argparse.Namespace) -> bool:
    """Whether questions about one image make one record."""
    # A set for evaluation has a record a question, unless somebody says otherwise.
    return not args.split if args.group_by_image is None else args.group_by_image


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError where a flag is missing or has no place beside another."""
    if args.recount:
        if not args.tokenizer:
            raise UsageError(f"--tokenizer=FILE_OR_FOLDER is needed; {TOKENIZER_HINT}")
        usage.check_exists("tokenizer", storage.path(args.tokenizer), TOKENIZER_HINT)
    elif args.format == CROPS:
        if not args.out:
            raise UsageError("--out=FOLDER is needed, as --out=data/reader")
    elif args.format != DOCUMENTS:
        _check_needed(args)
        if args.exclude and args.split:
            raise UsageError(
                f"--exclude keeps images out of training, and --split={args.split} is for "
                "evaluation; give one of them"
            )


def _check_needed(args: argparse.Namespace) -> None:
    """Raises UsageError with a command that has what is missing of --out and --tokenizer."""
    flags = {"--out=FOLDER": args.out, "--tokenizer=FILE_OR_FOLDER": args.tokenizer}
    needed = [flag for flag, value in flags.items() if not value]
    if not needed:
        usage.check_exists("tokenizer", storage.path(args.tokenizer), TOKENIZER_HINT)
        return
    out = args.out or _own_folder(args.source)
    tokenizer = args.tokenizer or f"{next_commands.DEFAULT_CHECKPOINT}/tokenizer"
    raise UsageError(
        f"{' and '.join(needed)} {'are' if len(needed) > 1 else 'is'} needed; {TOKENIZER_HINT}. "
        f"As: {next_commands.command('prepare')} --format={args.format} "
        f"--source={survey.quoted(args.source)} --out={survey.quoted(out)} "
        f"--tokenizer={survey.quoted(tokenizer)}"
        + survey.PAGES
        * (getattr(args, "holdout_by", "") == "page")
    )


def _own_folder(source: str) -> str:
    """Returns a folder for what is made of a source, for messages."""
    return f"data/{Path(source).stem or 'mine'}"
