"""What `inspect` does once its flags are read."""

import argparse
import dataclasses
import itertools
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from alignvlm_jax import logs, presets, storage
from alignvlm_jax.analysis import base
from alignvlm_jax.analysis import shown as shown_lib
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.config import Config, DataConfig, LLMConfig, ModelConfig, TrainConfig
from alignvlm_jax.data import filesystem, index, shards, stage_data, tokenizers
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.loader import TrainSequences
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import StoppedError, UserError, counted, nearest
from alignvlm_jax.inference import loading, patch_tokens
from alignvlm_jax.inference.assistant import Assistant
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.ingest import job, statistics
from alignvlm_jax.ingest.statistics import Statistics
from alignvlm_jax.parallel import distributed
from alignvlm_jax.pictures import patch_map
from alignvlm_jax.report import examples_page, records_page

MAX_COMPARED = 10_000
"""Ids among which one like a misspelt one is looked for: each takes a tenth of a millisecond."""


def folders(stages: tuple[Config, ...] | None, args: argparse.Namespace) -> None:
    """Prints the statistics of prepared folders, and writes a page of packed sequences.

    Args:
      stages: those of the config; None without one.
      args: the flags.

    Raises:
      UserError: there is no such stage, folder or split.
    """
    config = _default(args.data) if stages is None else _stage(stages, args.stage)
    if args.data:
        # `folders` prefers the sources of a mixture: without these --data is the one folder.
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, dir=args.data, sources={})
        )
    split = args.split or config.data.split
    if args.record or args.num_records:
        opened = StageData.open(config.data, config.model)
        builder = ExampleBuilder.of(config, opened.tokenizer)
        sources = [opened.records(folder, split) for folder in config.data.folders]
        folder_names = ", ".join(config.data.folders)
        has_labels = builder.fraction_with_labels > 0
        heading = records_page.Heading(folder_names, split, config.stage, has_labels)
        _show_records(sources, builder, heading, args)
        return
    _count(config.data)
    all_sequences = TrainSequences(config, split)
    packing_efficiency = (
        _packing_efficiency(all_sequences) if config.data.packing == "offline" else None
    )
    found = [
        statistics.collect(all_sequences.builder, folder, split, packing_efficiency)
        for folder in config.data.folders
    ]
    if stages is not None:
        others = [stage.stage for stage in stages if stage.stage != config.stage]
        stage = f"{config.stage}{'; others: --stage=' if others else ''}{', '.join(others)}"
        found = [
            dataclasses.replace(one, facts={"Stage": stage} | dict(one.facts)) for one in found
        ]
    console = Console(highlight=False, soft_wrap=True)
    for one in found:
        _print(one, console)
    views = [
        examples_page.view(i, all_sequences.segments(i), all_sequences.builder)
        for i in range(min(args.num_sequences, len(all_sequences)))
    ]
    out = args.out or storage.path(config.data.folders[0]) / examples_page.FILE
    console.print(f"Written: {examples_page.build(views, found[0], out)}")


def _show_records(
    sources: Sequence[RecordSource],
    builder: ExampleBuilder,
    heading: records_page.Heading,
    args: argparse.Namespace,
) -> None:
    """Writes a page of records that are chosen by their ids, by a text, or by chance.

    Raises:
      UserError: no record has the text, or none of an id.
    """
    # Records are numbered over all sources: of the first from starts[0] on, and so on.
    starts = np.cumsum([0, *map(len, sources)])
    order = np.arange(starts[-1])
    if args.shuffle is not None:
        order = np.random.default_rng(args.shuffle).permutation(order)
    owners = np.searchsorted(starts, order, side="right") - 1
    records = (
        sources[owner][int(i - starts[owner])] for i, owner in zip(order, owners, strict=True)
    )
    if args.record:
        found = _named(records, args.record)
    else:
        having = (record for record in records if records_page.has_text(record, args.filter))
        found = list(itertools.islice(having, args.num_records))
    if not found:
        raise UserError(
            f"none of {len(order):,} records of split {heading.split!r} has {args.filter!r}"
        )
    out = args.out or storage.path(builder.data.folders[0]) / records_page.FILE
    views = [records_page.view(record, builder) for record in found]
    for view in views:
        print(view)
    print(f"Written: {records_page.build(views, heading, builder.vision, out)}")


def _named(records: Iterable[Record], names: Sequence[str]) -> list[Record]:
    """Returns the records of these ids, in the order of the ids."""
    found: dict[str, Record] = {}
    others: list[str] = []
    # Ids stand in the records alone: they are read up to the last that is wanted.
    for record in records:
        if len(others) < MAX_COMPARED:
            others.append(record.id)
        if record.id in names:
            found[record.id] = record
        if len(found) == len(set(names)):
            break
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"no record {missing[0]!r}{nearest(missing[0], others)}")
    return [found[name] for name in dict.fromkeys(names)]


def analyse(chosen: Analysis, args: argparse.Namespace, argv: list[str]) -> None:
    """Runs an analysis: prints its tables, and writes analysis/NAME.json and NAME.png.

    Args:
      chosen: the analysis.
      args: its flags.
      argv: the command's arguments, which must be the same on all processes.

    Raises:
      UserError: a flag does not fit the model or its data.
    """
    # Before jax is asked for devices: after that, this process could no longer join the others.
    distributed.initialize(argv)
    config = loading.load_config(args.checkpoint, args.data)
    # Mistakes in the flags are found before the model is loaded.
    base.check_splits(config.data, config.eval, args)
    if chosen.needs_distribution:
        patch_tokens.check(config.model)
    if chosen.needs_token_per_patch:
        shown_lib.check(config.model)
    chosen.check(config, args)
    loaded = base.with_num_questions(loading.load(args.checkpoint, config), args)
    try:
        with loading.programs_kept(args.checkpoint):
            found = chosen.measure(loaded, args)
    except KeyboardInterrupt as err:
        why = "stopped; the same command goes on, and asks no question again"
        raise StoppedError(why, signal.SIGINT) from err
    # All processes measure and have the results; the main one writes them.
    if distributed.is_main():
        _write(chosen, loaded, args, found)


def _write(
    chosen: Analysis, loaded: Loaded, args: argparse.Namespace, found: Mapping[str, Any]
) -> None:
    """Prints the result of an analysis, and writes its files."""
    # The settings that decide the result; the file names the checkpoint and the analysis anyway.
    named = ("checkpoint", "analysis", "data")
    settings = {flag: value for flag, value in vars(args).items() if flag not in named}
    settings["data"] = loaded.config.data.dir
    written = base.write(loaded, chosen.name, settings, found)
    console = Console(highlight=False, soft_wrap=True)
    connector = loaded.config.model.connector.name
    console.print(f"{loaded.path}: connector {connector}", markup=False)
    chosen.show(console, found)
    console.print(f"Written: {written}", markup=False)
    picture = written.with_suffix(".png")
    storage.write_whole(picture, chosen.picture(connector, found))
    console.print(f"Written: {picture}", markup=False)


def lens(args: argparse.Namespace) -> None:
    """Writes the patch-token map of a page."""
    # All mistakes in the flags are found before the model is loaded.
    out = args.out or loading.workdir_of(args.checkpoint) / patch_map.FILE
    patch_map.check_suffix(out)
    config = loading.load_config(args.checkpoint, args.data)
    patch_tokens.check(config.model)
    page = loading.load_page(args.checkpoint, args.image, args.page)
    page_lens = Assistant(loading.load(args.checkpoint, config), warn=logs.say).lens(page)
    print(page_lens, file=sys.stderr)
    print(f"Written: {page_lens.save(out, f'What the patches of {args.image.name} say')}")


def _count(data: DataConfig) -> None:
    """Counts the tokens of folders that were never counted, as those of rendered documents."""
    for folder in data.folders:
        if filesystem.is_remote(folder) or index.is_counted(folder):
            continue
        if shards.shard_paths(Path(folder), data.split):
            print(f"{folder} has no index, which numbers need: it is made now, once")
            job.recount(Path(folder), str(stage_data.tokenizer_path(data)))


def _packing_efficiency(all_sequences: TrainSequences) -> float:
    """Returns the packing efficiency of the first epoch."""
    # Counters are of all sequences before a number: before the end of epoch 0, those of that epoch.
    return all_sequences.schedule.counters(all_sequences.schedule.epoch_at(0).end)[
        "packing_efficiency"
    ]


def _stage(stages: tuple[Config, ...], name: str) -> Config:
    """Returns the stage of this name, or the first one for ""."""
    by_name = {stage.stage: stage for stage in stages}
    if name and name not in by_name:
        raise UserError(f"--stage is {name!r}{nearest(name, by_name)}")
    return by_name.get(name, stages[0])


def _default(folder: str) -> Config:
    """Returns the config for a folder if none is given.

    It has the paper's encoder, and pages of up to six tiles and the overview.
    """
    tokenizer = tokenizers.load(folder)
    # A tokenizer without an image token gets the first id beyond its vocabulary.
    image_id = tokenizer.special_tokens.get("<image>", tokenizer.vocab_size)
    llm = LLMConfig(vocab_size=tokenizer.vocab_size)
    return Config(
        model=ModelConfig(
            vision=presets.VISION["siglip_so400m_14_384"], llm=llm, image_token_id=image_id
        ),
        data=DataConfig(
            dir=folder,
            packing="offline",
            seq_len=16_384,
            # As many tiles as fit into the sequence, at a token a patch.
            max_tiles=16_384 // presets.VISION["siglip_so400m_14_384"].num_patches,
            record_tiles=7,
            use_overview=True,
            tasks={"transcribe": 0.5, "answer": 0.5},
            max_unsupervised=1.0,
        ),
        train=TrainConfig(num_steps=1000, batch_size=32),
    )


def _print(one: Statistics, console: Console) -> None:
    """Prints the statistics of a split."""
    packing_efficiency = (
        "" if one.packing_efficiency is None else f", rows {one.packing_efficiency:.1%} full"
    )
    console.print(
        f"{one.directory}, split {one.name}: "
        f"{counted(one.num_records, 'record')}{packing_efficiency}",
        markup=False,
    )
    rows = [
        (name, *(f"{value:,}" for value in values)) for name, values in one.distributions.items()
    ]
    _print_table("", Statistics.COLUMNS, rows, console)
    for name, value in one.facts.items():
        console.print(f"{name}: {value}", markup=False)
    for reason, count in one.rejected.items():
        console.print(f"rejected {count:,}: {reason}", markup=False)
    for advice in one.advice:
        _print_table(advice.title, advice.columns, advice.rows, console)
        console.print(f"The first line is the present setting; {advice.conclusion}.", markup=False)


def _print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console
) -> None:
    """Prints rows of a name and a figure a column."""
    table = Table(box=None)
    table.add_column(title, overflow="fold")
    for column, shown in zip(columns, list(zip(*rows, strict=True))[1:], strict=False):
        # A figure that is cut would be another figure: on a narrow terminal names and heads wrap.
        head = column.replace(" ", "\n")
        table.add_column(head, justify="right", min_width=max(map(len, shown)))
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
