"""The last step of `prepare`: turns the parts of all units into the numbered shards of a data set.

Records whose id repeats are dropped, copies, and those for training that show images of validation
alone; questions about one image share a record. Small parts are joined, and the shards of every
split are numbered in the order of the source. Of a source so small that no document fell into
validation, one is held out all the same.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.data import index, tokenizers
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.data.record import Record, decode_record
from alignvlm_jax.data.shards import ShardWriter
from alignvlm_jax.ingest import exclude, grouping, staging
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Unit
from alignvlm_jax.ingest.grouping import Move, Table
from alignvlm_jax.ingest.staging import Rejects
from alignvlm_jax.ingest.writer import (
    Request,
    UnitOutput,
    read_lines,
    write_lines,
)

DROPPED = {
    grouping.REPEATED: "duplicate id",
    grouping.HELD_OUT: "its image is one of validation",
    grouping.COPIED: "its images, questions and words are those of another record",
}
"""Why records are dropped over all parts, by what becomes of them."""


def finish(
    outputs: Sequence[UnitOutput],
    units: Sequence[Unit],
    request: Request,
    folder: Path,
    unusable: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Writes the shards and the index of every split and `rejected.jsonl`, out of all parts.

    Records keep the order of the source. The call may be interrupted and repeated: what decides
    (the `ids` and `rejected` lines of the parts) is never changed by it.

    Args:
      outputs: the parts, one for each unit.
      units: the units of the source, in its order.
      request: what is prepared.
      folder: where the files are written.
      unusable: files of the source that nothing can open, by their escaped names, and why.

    Returns:
      The names of the files in `folder`.
    """
    table = grouping.read(outputs, request.splits)
    grouping.drop_repeated_ids(table, outputs)
    move = grouping.move_of(table, request.holdout) if not request.split else None
    if move:
        grouping.apply(table, move)
    if not request.split:
        grouping.drop_held_out(table)
    # Last: what is dropped joins nobody, and copies of a question would be asked twice.
    if request.group_tokens:
        # A set for evaluation asks what its makers ask, each question as often as they do.
        if not request.split:
            grouping.drop_copies(table)
        grouping.join(table, request.grouped, request.group_tokens)
    rejects = Rejects(DROPPED.values())
    for path, reason in unusable:
        rejects.add(reason, {"source": path, "id": Path(path).name, "reason": reason})
    names = _write_rejected(rejects, table, outputs, units, folder)
    # The moved document first: its records are copied out of parts that the other split then uses
    # up.
    for split in sorted(request.splits, key=lambda split: move is None or split != move.target):
        # A shard's name holds the number of shards, so the groups of the whole split are needed
        # before the first one is written.
        stay = np.append(0, np.cumsum(table.stay(split)))
        groups = _groups(np.diff(stay[table.starts]).tolist(), request.shard_records)
        shard_maker = _ShardMaker(table, outputs, split, request.tokenizer, move)
        for number, group in enumerate(groups):
            path = folder / shards_lib.shard_name(split, number, len(groups))
            # A shard that an interrupted call has made stays: its parts are gone by now.
            if not path.exists():
                shard_maker.make(group, path)
            names.append(path.name)
        if groups:
            names += index.merge(folder, split)
        if groups and request.split:
            items = _images(outputs, table.stay(split))
            exclude.write(folder / exclude.file_name(split), exclude.known_of(items))
            names.append(exclude.file_name(split))
    return names


def _images(
    outputs: Sequence[UnitOutput], stay: np.ndarray
) -> Iterator[tuple[str, int, list[int]]]:
    """Yields record and both hashes of the images of the lines that stay, bool [N]."""
    lines = itertools.chain.from_iterable(output.lines() for output in outputs)
    for line, stays in zip(lines, stay.tolist(), strict=True):
        if stays:
            for image, perceptual in zip(line.images, line.perceptual, strict=True):
                yield line.id, image, perceptual


def _write_rejected(
    rejects: Rejects,
    table: Table,
    outputs: Sequence[UnitOutput],
    units: Sequence[Unit],
    folder: Path,
) -> list[str]:
    """Writes the list of rejected records, and their counts; returns the names of both files.

    They follow what is rejected already. Of each part come first those that it rejected, then those
    that are dropped over all parts.
    """
    places = _Places(units)
    for number, output in enumerate(outputs):
        counts = json.loads(output.counts.read_text())
        for head, (name, reason, *where) in read_lines(output.rejected):
            # Beyond the list no line is looked for.
            if rejects.room(reason):
                rejects.add(reason, places.line(number, name, reason, *where))
            else:
                rejects.add_unlisted(reason, 1)
            counts[head] -= 1
        # What the part has counted beyond its list.
        for head, count in counts.items():
            rejects.add_unlisted(head, count)
        _add_dropped(rejects, table, outputs, places, number)
    write_lines(folder / staging.REJECTED, (value for _, value in rejects.listed))
    is_joined = table.fates == grouping.JOINED
    counts = {
        "rejected": dict(+rejects.counts),  # without those that never came
        "joined": int(is_joined.sum()),
        "into": len(np.unique(table.others[is_joined])),
        "documents": grouping.num_documents(table),
    }
    staging.write_json(folder / staging.COUNTS, counts)
    return [staging.REJECTED, staging.COUNTS]


def _add_dropped(
    rejects: Rejects,
    table: Table,
    outputs: Sequence[UnitOutput],
    places: "_Places",
    number: int,
) -> None:
    """Adds the records of a part that are dropped over all parts."""
    fates = table.fates[table.part(number)]
    for fate, reason in DROPPED.items():
        lines = table.starts[number] + np.flatnonzero(fates == fate)
        # Of a flood of copies those beyond the list are counted, and no names of them looked up.
        num_listed = rejects.room(reason)
        rejects.add_unlisted(reason, len(lines) - len(lines[:num_listed]))
        lines = lines[:num_listed]
        others = np.unique(table.others[lines])
        twins = dict(zip(others.tolist(), grouping.read_again(table, outputs, others), strict=True))
        known = grouping.read_again(table, outputs, lines)
        for other, one in zip(table.others[lines].tolist(), known, strict=True):
            whole = reason
            if fate in (grouping.REPEATED, grouping.COPIED):
                of = places.told(table.part_of(other), twins[other].place)
                first = "of one" if fate == grouping.REPEATED else twins[other].id
                whole = f"{reason} ({first} in {of})"
            rejects.add(whole, places.line(number, one.id, whole, one.place, one.names))


class _Places:
    """Where records lie, for a list of those that are rejected."""

    def __init__(self, units: Sequence[Unit]):
        self._units = units
        self._counted: dict[str, files.Places] = {}

    def line(
        self,
        number: int,
        name: str,
        reason: str,
        place: str | int = "",
        images: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Returns a line of the list: the file of part `number`, the place in it, the images, the
        id and the reason; those that are empty are left out."""
        found = {"place": self._spelled(number, place), "images": list(images)}
        path = self._units[number].path
        known = {key: value for key, value in found.items() if value}
        return {"source": path, **known, "id": name, "reason": reason}

    def told(self, number: int, place: str | int) -> str:
        """Returns the file of part `number` and the place in it, for a sentence."""
        return ", ".join(filter(None, (self._units[number].path, self._spelled(number, place))))

    def _spelled(self, number: int, place: str | int) -> str:
        if isinstance(place, str):
            return place
        path = self._units[number].path
        return self._counted.setdefault(path, files.Places(path)).spelled(place)


def _groups(sizes: Sequence[int], least: int) -> list[list[int]]:
    """Returns runs of consecutive parts that hold `least` records together.

    Args:
      sizes: number of records that are kept of each part.
      least: records of a shard, but for the last one.
    """
    groups: list[list[int]] = []
    size = least  # full, so that the first part opens a group
    for number, count in enumerate(sizes):
        if not count:
            continue
        if size >= least:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += count
    return groups


class _ShardMaker:
    """Makes the shards of a split out of parts."""

    def __init__(
        self,
        table: Table,
        outputs: Sequence[UnitOutput],
        split: str,
        tokenizer: str,
        move: Move | None,
    ):
        self._table = table
        self._outputs = outputs
        self._tokenizer = tokenizer
        # The target of a move reads the shards of its source, which the source needs later.
        self._is_copied = move is not None and split == move.target
        self._split = move.source if move and self._is_copied else split
        self._stay = table.stay(split)
        # Of this split alone: a part may hold records of both, where a document has moved.
        is_ours = table.splits_of == table.splits.index(split)
        members = np.flatnonzero(is_ours & (table.fates == grouping.JOINED))
        # By the record that they join, each record's in the order of the source.
        self._members = members[np.argsort(table.others[members], kind="stable")]

    def make(self, numbers: Sequence[int], path: Path) -> None:
        """Writes a shard and its index out of the shards of one or more parts.

        A single part that is kept whole is moved, all others are copied and then deleted.
        """
        shards = [self._outputs[number].shard(self._split) for number in numbers]
        lines = [self._lines(number) for number in numbers]
        whole = index.concatenate([index.read(index.index_path(shard)) for shard in shards])
        kept = np.flatnonzero(self._stay[np.concatenate(lines)])
        members = self._members_of(np.concatenate(lines))
        known = index.select(whole, kept)  # arrays of its own, which may be changed
        if len(shards) == 1 and len(kept) == len(whole) and not members and not self._is_copied:
            index.write(index.index_path(path), known)
            os.replace(shards[0], path)
            return
        with ShardWriter(path) as writer:
            row = 0
            for shard, its_lines in zip(shards, lines, strict=True):
                records = shards_lib.read_shard(shard)
                for line, record in zip(its_lines.tolist(), records, strict=True):
                    # The index has a row for each record that is written, and for no other.
                    if not self._stay[line]:
                        continue
                    if line in members:
                        first = grouping.joined([decode_record(record), *members[line]])
                        counted = index.text_tokens(first, tokenizers.load(self._tokenizer))
                        # Its images are the same, and with them their sizes.
                        for task, length in counted.items():
                            known.text_tokens[task][row] = length
                        known.content_hash[row] = index.content_hash(first)
                        record = first
                    writer.write(record)
                    row += 1
            # Within the block: a shard that exists has its index.
            index.write(index.index_path(path), known)
        # Only now: ShardWriter puts the shard in place as its block ends, and until then an
        # interrupted call needs the parts again.
        for shard in () if self._is_copied else shards:
            shard.unlink()

    def _lines(self, number: int) -> np.ndarray:
        """Returns the lines of a part's records in its shard of this split, int64 [n]."""
        # A part has one `ids` file but a shard for each split.
        splits = self._table.lines["split"][self._table.part(number)]
        return self._table.starts[number] + np.flatnonzero(
            splits == self._table.splits.index(self._split)
        )

    def _members_of(self, lines: np.ndarray) -> dict[int, list[Record]]:
        """Returns by line, of some lines in ascending order, the records that have joined it,
        without their images, which would fill the memory."""
        others = self._table.others
        begin, end = np.searchsorted(others[self._members], [lines[0], lines[-1] + 1])
        members = self._members[begin:end]
        found: dict[int, list[Record]] = {}
        # Part by part, each opened once: those that joined may lie anywhere behind the first.
        parts = np.searchsorted(self._table.starts, members, side="right") - 1
        for number in np.unique(parts).tolist():
            of_part = self._lines(number)
            places = np.flatnonzero(np.isin(of_part, members[parts == number])).tolist()
            records = shards_lib.read_records(self._outputs[number].shard(self._split), places)
            for line, record in zip(of_part[places].tolist(), records, strict=True):
                bare = dataclasses.replace(decode_record(record), images=())
                found.setdefault(int(others[line]), []).append(bare)
        return found
