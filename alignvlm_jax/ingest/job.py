"""The `prepare` job: reads the units of a source on many workers and writes training shards."""

import dataclasses
import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)

from alignvlm_jax import logs
from alignvlm_jax.data import chat_template, filesystem, index, record, tokenizers
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import exclude, executors, finish, staging, summary
from alignvlm_jax.ingest import writer as writer_lib
from alignvlm_jax.ingest.formats import survey
from alignvlm_jax.ingest.formats.base import Unit
from alignvlm_jax.ingest.writer import Request, UnitOutput, UnitWriter

VERSION = 5
"""Version of the records, raised with every change to them so that `prepare` writes them anew."""

Runner = Callable[[UnitWriter, list[tuple[int, Unit]]], None]
"""A function that calls the writer for all tasks (part number, unit), on any workers."""


def prepare(request: Request, out: Path, run: Runner, overwrite: bool = False) -> bool:
    """Writes the prepared data to the folder `out`, resuming an interrupted job; `overwrite` allows
    it to take the place of what other flags made.

    Returns:
      False if `out` already held this data, else True.

    Raises:
      UserError: there is no such source or tokenizer, `out` is the source or was prepared with
        other flags, the source has no record that can be used, or the data cannot be written.
    """
    tokenizer = tokenizers.load(request.tokenizer)
    chat_template.format_of(tokenizer)  # raises before anything is read
    units = _units(request, out)
    _check_holdout(request, units)
    unusable = filesystem.unusable_files(request.source, request.format.suffixes)
    wanted = _wanted(request, units, unusable, out)
    # The description holds a listing of the source: a source that has grown is prepared anew.
    if staging.is_ready(out, wanted):
        return False
    if not overwrite:
        staging.check_flags(out, wanted, request.splits)
        staging.check_tokenizer(out, request.splits, request.tokenizer)
    folder = staging.partial_folder(out, wanted)
    # It lists the files to publish. Once it is there, `finish` must not run again: some files may
    # have moved to `out` already.
    names = folder / "finished.json"
    if not names.exists():
        excluded = folder / "excluded.npz"
        if request.exclude and not excluded.exists():
            exclude.gather(request.exclude, excluded)
        writer = UnitWriter(
            str(folder / "parts"), request, str(excluded) if request.exclude else ""
        )
        written = _write_outputs(writer, units, run)
        tokenizer_names = _copy_tokenizer(request.tokenizer, folder)
        data_names = finish.finish(written, units, request, folder, unusable)
        # Two names: what was rejected, and how much of it, but no shard.
        if len(data_names) == 2:
            raise UserError(
                f"{request.source} has no record that can be used{summary.reasons(folder)}"
            )
        data_names += staging.join_images([output.images for output in written], folder)
        staging.write_json(names, [*data_names, *tokenizer_names])
    staging.publish(out, folder, json.loads(names.read_text()), request.splits, wanted)
    return True


def on_processes(num_workers: int) -> Runner:
    """Returns a runner on processes of this machine, which shows a progress bar."""

    def run(writer: UnitWriter, tasks: list[tuple[int, Unit]]) -> None:
        columns = (TextColumn("Preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("pieces"))
        columns += (
            TextColumn("{task.fields[records]:,} records, {task.fields[rate]:.0f}/s"),
            TimeRemainingColumn(),
        )
        started = time.monotonic()
        records = 0
        with Progress(*columns) as progress:
            bar = progress.add_task("", total=len(tasks), records=0, rate=0.0)
            for done in executors.run(writer, tasks, num_workers):
                records += done.records
                rate = records / max(time.monotonic() - started, 1e-9)
                progress.update(bar, advance=done.outputs, records=records, rate=rate)

    return run


def recount(out: Path, tokenizer_path: str) -> dict[str, int]:
    """Rewrites the index files of a prepared folder with the token counts of another tokenizer.

    Shards stay as they are. An interrupted recount resumes: a shard whose own index is of this
    tokenizer is not counted again.

    Returns:
      The number of records by split.

    Raises:
      UserError: there are no shards, or one is damaged.
    """
    tokenizer = tokenizers.load(tokenizer_path)
    fingerprint = index.tokenizer_fingerprint(tokenizer_path)
    chat_template.format_of(tokenizer)
    names = shards_lib.split_names(path.name for path in out.glob("*"))
    if not names:
        raise UserError(f"no shards in {out}; run `prepare` first")
    splits = {split: [out / name for name in of] for split, of in names.items()}
    uncounted = {
        split: of for split, of in splits.items() if not _is_merged(out, split, fingerprint)
    }
    for shard in track([shard for of in uncounted.values() for shard in of], "Counting tokens"):
        path = index.index_path(shard)
        if not _is_counted(path, fingerprint):
            records = map(record.decode_record, shards_lib.read_shard(shard))
            index.write(path, index.of_records(records, tokenizer, fingerprint))
    # The indexes of single shards are the progress of a recount; the merged one replaces them.
    for split, of in uncounted.items():
        index.merge(out, split)
        for shard in of:
            index.index_path(shard).unlink(missing_ok=True)
    return {split: len(index.load(out, split)) for split in splits}


def _check_holdout(request: Request, units: Sequence[Unit]) -> None:
    """Raises UserError where a fraction of the documents is to be held out of a single PDF: all of
    its pages would go to one split, and the other would be empty."""
    is_whole = getattr(request.format, "holdout_by", "") == "document"
    is_one = len({unit.path for unit in units}) == 1
    if is_whole and is_one and not request.split and 0 < request.holdout < 1:
        raise UserError(
            f"{request.source} is one document: none could be held out; --holdout_by=page splits "
            "it by pages, and --holdout=0 holds out nothing"
        )


def _units(request: Request, out: Path) -> list[Unit]:
    """Returns the units of the source, without those that lie in `out` or in another folder that
    `prepare` wrote: their lists of what was rejected are no records.

    Raises:
      UserError: `out` is the source itself.
    """
    units = request.format.units(request.source)
    staging.check_out(out, source=request.source)
    kept, prepared = survey.without_prepared(request.source, out, (unit.path for unit in units))
    for folder in prepared:
        logs.say(f"{folder} is what prepare wrote: it is left out of the source")
    return [unit for unit in units if unit.path in kept]


def _wanted(
    request: Request, units: Sequence[Unit], unusable: Sequence[tuple[str, str]], out: Path
) -> dict[str, Any]:
    """Returns a JSON description that is equal for two jobs only if they make the same data.

    A checksum of the source's listing is part of it: another file, or one that has grown or was
    written anew, makes other data.
    """
    # A file of many units is measured once: in a bucket, each size is a request.
    paths = dict.fromkeys(unit.path for unit in units)
    # Formats may read files beside those of their units, as those of OCR.
    also_read = request.format.also_read(request.source)
    # Files of this job itself, as prepare.json, would make other data of it each time.
    kept, _ = survey.without_prepared(request.source, out, also_read)
    also_read = [path for path in also_read if path in kept]
    listing = [
        [dataclasses.astuple(unit) for unit in units],
        # With the time: an answer that was mended may have as many bytes as before.
        [filesystem.entry(path) for path in (*paths, *also_read)],
        unusable,
    ]
    # Those for evaluation are written, and those of `exclude` compared.
    has_hashes = request.split or request.exclude
    return {
        **({"perceptual_hash": exclude.VERSION} if has_hashes else {}),
        "format": request.name,
        "source": request.source,
        **dataclasses.asdict(request.format),
        "holdout": request.holdout,
        "split": request.split,
        "group_tokens": request.group_tokens,
        "shard_records": request.shard_records,
        "allow_outside": request.allow_outside,
        "exclude": [[one, exclude.contents(one)] for one in request.exclude],
        "tokenizer": index.tokenizer_fingerprint(request.tokenizer),
        "listing": f"{zlib.crc32(json.dumps(listing).encode()):08x}",
        "version": VERSION,
    }


def _write_outputs(writer: UnitWriter, units: Sequence[Unit], run: Runner) -> list[UnitOutput]:
    """Writes the parts that are not there yet; returns all of them, one for each unit."""
    place = Path(writer.folder)
    place.mkdir(exist_ok=True)
    # Workers that were killed leave folders of parts in work, which nobody would complete.
    for leftover in place.glob(f"{writer_lib.BESIDE}*"):
        shutil.rmtree(leftover)
    all_outputs = [UnitOutput(place, number) for number in range(len(units))]
    # Until shards are made of the parts, one whose images were edited meanwhile is made anew.
    if not any(place.parent.glob("*-of-*")):
        for output in all_outputs:
            if output.is_done() and output.images.exists() and staging.is_changed(output.images):
                output.remove()
    tasks = [
        (output.number, unit)
        for output, unit in zip(all_outputs, units, strict=True)
        if not output.is_done()
    ]
    if tasks:
        run(writer, tasks)
    return all_outputs


def _copy_tokenizer(path: str, folder: Path) -> list[str]:
    """Copies the tokenizer's file to `folder`, so that the data is self-contained, with its chat
    format where that does not follow from its special tokens; returns the names there."""
    file, content = tokenizers.read(path)
    # A file that starts with a brace is a Hugging Face tokenizer.json.
    name = tokenizers.NAMES[content.lstrip()[:1] != b"{"]
    (folder / name).write_bytes(content)
    if not (chat_format := chat_template.format_file(tokenizers.load(file))):
        return [name]
    (folder / tokenizers.CHAT_FORMAT).write_text(chat_format)
    return [name, tokenizers.CHAT_FORMAT]


def _is_merged(out: Path, split: str, fingerprint: str) -> bool:
    """Whether a split has a merged index of this tokenizer and readable shards."""
    try:
        is_ours = (out / index.merged_name(split)).exists() and index.load(
            out, split
        ).tokenizer == fingerprint
        return (
            is_ours
            and (out / shards_lib.table_name(split)).exists()
            and len(shards_lib.RecordSource(out, split)) > 0
        )
    except UserError:
        return False


def _is_counted(path: Path, fingerprint: str) -> bool:
    """Whether the index file of a single shard is there and of this tokenizer."""
    try:
        return index.read(path).tokenizer == fingerprint
    except UserError:
        return False
