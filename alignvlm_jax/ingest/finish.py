"""Parts to shards: duplicates leave, small parts join, and every split is numbered through."""

import collections
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from alignvlm_jax.data import index
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.data.shards import ShardWriter
from alignvlm_jax.ingest import staging
from alignvlm_jax.ingest.formats.base import Unit
from alignvlm_jax.ingest.writer import UnitOutput, read_lines, write_lines

MIN_SHARD_RECORDS = 1000
"""Parts of fewer records are joined, as those of a held-out split."""

Dropped = dict[int, dict[int, str]]
"""By part, by line of its `ids`: why a record does not stay."""


def finish(
    outputs: Sequence[UnitOutput], units: Sequence[Unit], splits: Sequence[str], folder: Path
) -> list[str]:
    """Makes shards, an index of each split and `rejected.jsonl` in `folder` out of all parts, in
    the order of the source. Returns their names. It may be interrupted and called again: the lines
    of parts, which decide, stay as they are."""
    dropped = _duplicates(outputs, units)
    names = [staging.REJECTED]
    write_lines(folder / staging.REJECTED, _rejected(outputs, units, dropped))
    for split in splits:
        kept = {
            number: _kept(output, split, dropped[number]) for number, output in enumerate(outputs)
        }
        groups = _groups({number: len(lines) for number, lines in kept.items()})
        for shard, group in enumerate(groups):
            path = folder / shards_lib.shard_name(split, shard, len(groups))
            if not path.exists():
                _join({outputs[number]: kept[number] for number in group}, split, path)
            names.append(path.name)
        if groups:
            names += index.merge(folder, split)
    return names


def _duplicates(outputs: Sequence[UnitOutput], units: Sequence[Unit]) -> Dropped:
    """Finds records whose id came before.

    By hashes first, 8 bytes a record: few ids are ever held at a time.
    """
    hashes = [
        np.fromiter((_hash(name) for name, _ in read_lines(output.ids)), np.uint64)
        for output in outputs
    ]
    values, counts = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *hashes]), return_counts=True
    )
    repeated = values[counts > 1]
    first: dict[str, str] = {}
    dropped: Dropped = collections.defaultdict(dict)
    for number in np.flatnonzero([np.isin(of_part, repeated).any() for of_part in hashes]):
        suspect = np.isin(hashes[number], repeated)
        for line, (name, _) in enumerate(read_lines(outputs[number].ids)):
            if suspect[line]:
                if name in first:
                    dropped[int(number)][line] = f"duplicate id (of one in {first[name]})"
                first.setdefault(name, units[number].path)
    return dropped


def _rejected(
    outputs: Sequence[UnitOutput], units: Sequence[Unit], dropped: Dropped
) -> Iterator[dict[str, str]]:
    for number, (output, unit) in enumerate(zip(outputs, units, strict=True)):
        for name, reason in read_lines(output.rejected):
            yield {"source": unit.path, "id": name, "reason": reason}
        if number in dropped:
            names = [name for name, _ in read_lines(output.ids)]
            for line, reason in dropped[number].items():
                yield {"source": unit.path, "id": names[line], "reason": reason}


def _kept(output: UnitOutput, split: str, dropped: dict[int, str]) -> list[bool]:
    """For each record of a part's shard, whether it stays; nothing where none does."""
    lines = [
        line not in dropped for line, (_, of) in enumerate(read_lines(output.ids)) if of == split
    ]
    return lines if any(lines) else []


def _groups(sizes: dict[int, int]) -> list[list[int]]:
    """Runs of parts that have enough records together."""
    groups: list[list[int]] = []
    size = MIN_SHARD_RECORDS
    for number, count in sizes.items():
        if not count:
            continue
        if size >= MIN_SHARD_RECORDS:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += count
    return groups


def _join(kept: dict[UnitOutput, list[bool]], split: str, path: Path) -> None:
    """Makes a shard and its index. The shard, which comes last, says that both are there; a part's
    is moved where it stays whole, and else deleted after it was copied."""
    shards = [output.shard(split) for output in kept]
    indexes = [index.read(index.index_path(shard)) for shard in shards]
    chosen = [
        index.select(one, np.flatnonzero(lines))
        for one, lines in zip(indexes, kept.values(), strict=True)
    ]
    index.write(index.index_path(path), index.concatenate(chosen))
    if len(shards) == 1 and all(*kept.values()):
        os.replace(shards[0], path)
        return
    with ShardWriter(path) as writer:
        for shard, lines in zip(shards, kept.values(), strict=True):
            for record, stays in zip(shards_lib.read_shard(shard), lines, strict=True):
                if stays:
                    writer.write(record)
    for shard in shards:
        shard.unlink()


def _hash(name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big"
    )
