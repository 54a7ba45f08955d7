"""What `prepare` does once its flags are read."""

import argparse
import dataclasses
import time
from pathlib import Path

from alignvlm_jax.commands import next_commands
from alignvlm_jax.commands.prepare import is_grouped
from alignvlm_jax.data import index, shards
from alignvlm_jax.ingest import executors, job, staging, summary
from alignvlm_jax.ingest.formats import REGISTRY, survey


def drawn(args: argparse.Namespace) -> None:
    """Prepares a data set that is drawn: the demonstration's documents, or the reader's lines."""
    # Imported here: their packages are not in the base install, and nothing else needs them.
    from alignvlm_jax.synthetic import demonstration, drawn, reader

    started = time.monotonic()
    arguments = {
        name: value
        for name, value in vars(args).items()
        if name not in ("out", "num_workers", "recount", "overwrite")
    }
    kind = {"documents": demonstration, "crops": reader}[args.format]
    data = kind.data_set(arguments)
    if not drawn.prepare(Path(args.out), data, args.num_workers, args.overwrite):
        print(f"{args.out} is ready: prepared with these arguments before")
        return
    _print_lines(staging.drop_drawn(Path(args.out)))
    sizes = ", ".join(f"{split} {size}" for split, size in data.sizes.items())
    print(f"{args.out}: {args.format} by split: {sizes}; {time.monotonic() - started:.0f} s")


def source(args: argparse.Namespace, beam_flags: list[str]) -> None:
    """Prepares a source, on processes of this machine or under Apache Beam."""
    started = time.monotonic()
    kind = REGISTRY[args.format]
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
    request = job.Request(
        args.format,
        kind(**options),
        args.source,
        args.tokenizer,
        args.holdout,
        args.split,
        group_tokens=args.group_tokens if is_grouped(args) else 0,
        shard_records=args.shard_records,
        allow_outside=args.allow_outside,
        exclude=tuple(args.exclude),
    )
    if args.beam_runner:
        run = executors.under_beam(args.beam_runner, beam_flags)
    else:
        run = job.on_processes(args.num_workers)
    found = survey.survey(args.source, args.out)
    _print_lines(found.about_images(args.format), found.about_files(args.format))
    # Formats that tell public sets by their columns or members say which, and by what.
    _print_lines(*request.format.notes(args.source))
    before = summary.hashes(Path(args.out), request.splits)
    is_new = job.prepare(request, Path(args.out), run, args.overwrite)
    print(summary.of(Path(args.out), request.splits))
    if is_new:
        _print_lines(summary.moved(before, Path(args.out)), staging.drop_drawn(Path(args.out)))
    held = [split for split in request.splits if shards.shard_paths(args.out, split)]
    num_images = sum(len(index.load(args.out, split).image_sizes) for split in held)
    _print_lines(found.about_unnamed(args.format, num_images))
    if is_new:
        print(f"{args.out}: {time.monotonic() - started:.0f} s")
    else:
        print(f"{args.out} is ready: prepared with these arguments before")
    if not args.split and shards.shard_paths(args.out, "train"):
        print(next_commands.after_prepare(args.out, request.tokenizer))


def recount(args: argparse.Namespace) -> None:
    """Counts the tokens of a prepared folder anew."""
    counts = job.recount(Path(args.out), args.tokenizer)
    _print_lines(staging.drop_drawn(Path(args.out)))
    sizes = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    print(f"{args.out}: counted {sizes} records")


def _print_lines(*lines: str) -> None:
    """Prints the lines that are not empty."""
    for line in filter(None, lines):
        print(line)
