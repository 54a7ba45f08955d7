"""The last step of `prepare`: turns the parts of all units into the numbered shards of a data set.

Records whose id repeats are dropped, and those for training that show images of validation alone;
small parts are joined, and the shards of every split are numbered in the order of the source. Of a
source so small that no document fell into validation, one is held out all the same.
"""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data import index
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.data.shards import ShardWriter
from alignvlm_jax.ingest import staging
from alignvlm_jax.ingest.formats.base import Unit
from alignvlm_jax.ingest.writer import (
    SPLITS,
    UnitOutput,
    document_hash,
    read_lines,
    write_lines,
)

MIN_SHARD_RECORDS = 1000
"""Smallest number of records of a shard (but for the last one of a split).

Parts with fewer records, as those of a held-out split, are joined with the next ones.
"""

Dropped = dict[int, dict[int, str]]
"""The reason why a record is dropped, by number of its part and by line of the part's `ids`."""


class Move(NamedTuple):
    """A document that goes to another split than the one it was written to, which has no other.

    Attributes:
      document: its `writer.document_hash`.
      source: the split of the parts' shards that it is in.
      target: the split that it goes to.
    """

    document: int
    source: str
    target: str


def finish(
    outputs: Sequence[UnitOutput],
    units: Sequence[Unit],
    splits: Sequence[str],
    folder: Path,
    holdout: float,
) -> list[str]:
    """Writes the shards and the index of every split and `rejected.jsonl`, out of all parts.

    Records keep the order of the source. The call may be interrupted and repeated: what decides
    (the `ids` and `rejected` lines of the parts) is never changed by it.

    Args:
      outputs: the parts, one for each unit.
      units: the units of the source, in its order.
      splits: names of the splits to write.
      folder: where the files are written.
      holdout: fraction of documents for validation; between 0 and 1 each split gets at least one.

    Returns:
      The names of the files in `folder`.
    """
    dropped = _duplicates(outputs, units)
    names = [staging.REJECTED]
    move = _move(outputs, dropped, holdout) if tuple(splits) == SPLITS else None
    _drop_held_out(outputs, dropped, move)
    write_lines(folder / staging.REJECTED, _rejected(outputs, units, dropped))
    # The moved document first: its records are copied out of parts that the other split then uses
    # up.
    for split in sorted(splits, key=lambda split: move is None or split != move.target):
        is_copied = move is not None and split == move.target
        source = move.source if is_copied else split
        kept = {
            number: _kept(output, split, dropped[number], move)
            for number, output in enumerate(outputs)
        }
        # A shard's name holds the number of shards, so the groups of the whole split are needed
        # before the first one is written.
        groups = _groups({number: len(lines) for number, lines in kept.items()})
        for shard, group in enumerate(groups):
            path = folder / shards_lib.shard_name(split, shard, len(groups))
            # A shard that an interrupted call has made stays: its parts are gone by now.
            if not path.exists():
                _join({outputs[number]: kept[number] for number in group}, source, path, is_copied)
            names.append(path.name)
        if groups:
            names += index.merge(folder, split)
    return names


def _duplicates(outputs: Sequence[UnitOutput], units: Sequence[Unit]) -> Dropped:
    """Returns the records whose id came before, in the order of the source.

    Two passes keep memory small: the first holds a hash of 8 bytes a record, the second only the
    ids whose hash repeats.
    """
    # One uint64 array for each part, in the order of its lines.
    hashes = [
        np.fromiter((document_hash(name) for name, *_ in read_lines(output.ids)), np.uint64)
        for output in outputs
    ]
    # An empty array in front: np.concatenate refuses an empty list.
    values, counts = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *hashes]), return_counts=True
    )
    repeated = values[counts > 1]
    first: dict[str, str] = {}
    dropped: Dropped = collections.defaultdict(dict)
    for number in np.flatnonzero([np.isin(of_part, repeated).any() for of_part in hashes]):
        suspect = np.isin(hashes[number], repeated)
        for line, (name, *_) in enumerate(read_lines(outputs[number].ids)):
            # Equal hashes are no proof: the ids themselves decide, so that a collision drops no
            # good record.
            if suspect[line]:
                if name in first:
                    dropped[int(number)][line] = f"duplicate id (of one in {first[name]})"
                first.setdefault(name, units[number].path)
    return dropped


def _rejected(
    outputs: Sequence[UnitOutput], units: Sequence[Unit], dropped: Dropped
) -> Iterator[dict[str, str]]:
    """Yields the lines of `rejected.jsonl`: records that parts rejected, then duplicates."""
    for number, (output, unit) in enumerate(zip(outputs, units, strict=True)):
        for name, reason in read_lines(output.rejected):
            yield {"source": unit.path, "id": name, "reason": reason}
        if number in dropped:
            names = [name for name, *_ in read_lines(output.ids)]
            for line, reason in dropped[number].items():
                yield {"source": unit.path, "id": names[line], "reason": reason}


def _move(outputs: Sequence[UnitOutput], dropped: Dropped, holdout: float) -> Move | None:
    """Returns the document that has to change its split, so that neither split is empty.

    It is the one that the next larger, or smaller, `holdout` would move, whatever the order of the
    parts. None where both splits have records, where `holdout` empties one on purpose, or where
    there are not two documents.
    """
    found: dict[str, tuple[int, int]] = {}
    for number, output in enumerate(outputs):
        for line, (_, split, *place) in enumerate(read_lines(output.ids)):
            # A part that an earlier version began does not say of what document its records are.
            if not place:
                return None
            if line not in dropped[number]:
                lowest, highest = found.get(split, (place[0], place[0]))
                found[split] = min(lowest, place[0]), max(highest, place[0])
        # Of a large source the first parts tell.
        if len(found) == len(SPLITS):
            return None
    if not found or not 0 < holdout < 1:
        return None
    [(source, (lowest, highest))] = found.items()
    [target] = set(SPLITS) - {source}
    document = lowest if target == "validation" else highest
    return None if lowest == highest else Move(document, source, target)


def _drop_held_out(outputs: Sequence[UnitOutput], dropped: Dropped, move: Move | None) -> None:
    """Drops the records for training all of whose images are, byte for byte, some of validation:
    copies of a file, or documents that share it. One image among others, as a blank page, drops
    none."""
    held: set[int] = set()
    # Two passes: in the order of the source a record of validation may come after its copies.
    for is_first in (True, False):
        for number, output in enumerate(outputs):
            for line, (_, split, *place) in enumerate(read_lines(output.ids)):
                if line in dropped[number] or len(place) < 2:
                    continue
                document, hashes = place
                split = move.target if move and document == move.document else split
                if is_first and split == "validation":
                    held.update(hashes)
                elif not is_first and split == "train" and hashes and held.issuperset(hashes):
                    dropped[number][line] = "its image is one of validation"
        if not held:
            return


def _kept(output: UnitOutput, split: str, dropped: dict[int, str], move: Move | None) -> list[bool]:
    """Returns whether each record of a part's shard is kept in `split`; empty if none is.

    The shard is that of `split`, or for the target of a move that of its source.
    """
    is_target = move is not None and split == move.target
    source = move.source if is_target else split
    # A part has one `ids` file but a shard for each split: dropped lines count in the file, the
    # result counts in the shard.
    lines = [
        line not in dropped and (move is None or (place[:1] == [move.document]) == is_target)
        for line, (_, of, *place) in enumerate(read_lines(output.ids))
        if of == source
    ]
    return lines if any(lines) else []


def _groups(sizes: dict[int, int]) -> list[list[int]]:
    """Returns runs of consecutive parts that hold `MIN_SHARD_RECORDS` together.

    Args:
      sizes: number of records that are kept, by number of the part.
    """
    groups: list[list[int]] = []
    size = MIN_SHARD_RECORDS  # full, so that the first part opens a group
    for number, count in sizes.items():
        if not count:
            continue
        if size >= MIN_SHARD_RECORDS:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += count
    return groups


def _join(kept: dict[UnitOutput, list[bool]], split: str, path: Path, is_copied: bool) -> None:
    """Writes a shard and its index out of the shards of one or more parts.

    The index is written first: a shard that exists has its index. A single part that is kept whole
    is moved, all others are copied and then deleted; with `is_copied` all stay.
    """
    shards = [output.shard(split) for output in kept]
    indexes = [index.read(index.index_path(shard)) for shard in shards]
    chosen = [
        index.select(one, np.flatnonzero(lines))
        for one, lines in zip(indexes, kept.values(), strict=True)
    ]
    index.write(index.index_path(path), index.concatenate(chosen))
    if len(shards) == 1 and all(*kept.values()) and not is_copied:
        os.replace(shards[0], path)
        return
    with ShardWriter(path) as writer:
        for shard, lines in zip(shards, kept.values(), strict=True):
            for record, stays in zip(shards_lib.read_shard(shard), lines, strict=True):
                if stays:
                    writer.write(record)
    # Only now: ShardWriter puts the shard in place as its block ends, and until then an interrupted
    # call needs the parts again.
    for shard in () if is_copied else shards:
        shard.unlink()
