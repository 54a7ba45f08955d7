"""Records of ArrayRecord shards, on disk or in a bucket: written one by one, read at random."""

import contextlib
import functools
import os
import re
import resource
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module

from alignvlm_jax.data import arrays, filesystem, shard_ends
from alignvlm_jax.data.filesystem import Entry
from alignvlm_jax.data.record import Record, decode_record, encode_record
from alignvlm_jax.data.shard_ends import Table
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.storage import faults
from alignvlm_jax.storage.faults import Kind

SPARE_FILES = 512
"""Open files that everything but the shards may need."""

MAX_COMING = 1024
"""Records that were begun and not yet asked for, of a split."""

ENDINGS = (".array_record", ".npz")
# which finds nothing to do while `prepare.json` stands
AGAIN = "delete the folder and run `prepare` again"


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


def shard_names(directory: str | os.PathLike, split: str) -> list[str]:
    """Returns the names of a split's shards that are there, in order."""
    is_shard = re.compile(rf"{re.escape(split)}-\d+-of-\d+\.array_record").fullmatch
    return sorted(filter(is_shard, filesystem.listing(directory)))


def shard_paths(directory: str | Path, split: str) -> list[Path]:
    """Returns the shards of a split that are there, in order, of a folder of this machine."""
    return [Path(directory, name) for name in shard_names(directory, split)]


def table_name(split: str) -> str:
    """Returns the name of the file that says where the records of all shards of a split lie; see
    `shards.Table`."""
    return f"shards-{split}.npz"


def write_table(directory: Path, split: str) -> None:
    """Writes that file.

    Raises:
      UserError: a shard is damaged, or the file cannot be written.
    """
    entries = filesystem.listing(directory)
    names = shard_names(directory, split)
    ends = filesystem.in_threads(
        lambda name: shard_ends.read_ends(directory / name, entries[name].size), names
    )
    arrays.write(directory / table_name(split), shard_ends.table(ends)._asdict())


class ShardWriter:
    """Writes one shard, beside `path` first: a file of that name is always whole. For a `with`
    statement; what raises within leaves no shard."""

    def __init__(self, path: str | Path):
        """
        Raises:
          UserError: the file cannot be written; so do all methods, as on a full disk.
        """
        self._path = path
        self._beside = Path(f"{path}.tmp")
        with self._errors():
            # One record a group: a larger group is decompressed whole for every random read.
            self._writer = array_record_module.ArrayRecordWriter(str(self._beside), "group_size:1")

    def write(self, record: Record | bytes) -> None:
        """Adds a record, or one that is encoded."""
        with self._errors():
            self._writer.write(record if isinstance(record, bytes) else encode_record(record))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            with self._errors():
                self._writer.close()
                if kind is None:
                    os.replace(self._beside, self._path)
        finally:
            self._beside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as err:  # the writer knows RuntimeError alone
            raise UserError(f"cannot write {self._path}: {err}") from err


def write_shard(path: str | Path, records: Iterable[Record]) -> None:
    """Writes records to one shard, as `ShardWriter` does."""
    with ShardWriter(path) as shard:
        for record in records:
            shard.write(record)


def read_shard(path: str | Path) -> Iterator[bytes]:
    """Reads the encoded records of one shard in order.

    Raises:
      UserError: it is damaged.
    """
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        for index in range(reader.num_records()):
            yield reader.read([index])[0]
    except RuntimeError as err:
        raise UserError(f"cannot read {path} ({err}); {AGAIN}") from err


def fingerprint(*directories: str | os.PathLike) -> str:
    """Returns a checksum of what `prepare` was asked for and of the tokenizer, in every folder:
    other data have another one. Where there is neither it is that of nothing."""
    return _fingerprint(directories, ("prepare.json", "tokenizer.model", "tokenizer.json"))


def contents(*directories: str | os.PathLike) -> str:
    """Returns what tells folders from copies that are not whole, or are older, in words: the number
    and bytes of their shards and indexes, and a checksum of the names, sizes, indexes and
    fingerprint. Nothing of the shards is read: the sizes of small ones are alike, but an index
    holds a hash of every record."""
    found: list[tuple[str, int]] = []
    checksums: list[dict[str, int]] = []
    for directory in directories:
        entries = filesystem.listing(directory)
        files = sorted(
            (name, entry.size) for name, entry in entries.items() if name.endswith(ENDINGS)
        )
        indexes = [
            (filesystem.join(os.fspath(directory), name), size)
            for name, size in files
            if name.endswith(".npz")
        ]
        checksums += filesystem.in_threads(lambda one: arrays.checksums(*one), indexes)
        found += files
    digest = zlib.crc32(repr((found, checksums, fingerprint(*directories))).encode())
    return (
        f"{len(found):,} files of {sum(size for _, size in found):,} bytes, checksum {digest:08x}"
    )


def has_fingerprint(saved: str, *directories: str | os.PathLike) -> bool:
    """Whether `saved` is the fingerprint of these folders, or the one of before a tokenizer.json
    counted."""
    return saved in (
        fingerprint(*directories),
        _fingerprint(directories, ("prepare.json", "tokenizer.model")),
    )


def _fingerprint(directories: Sequence[str | os.PathLike], names: Sequence[str]) -> str:
    crc = 0
    for directory in directories:
        entries = filesystem.listing(directory)
        for name in names:
            if name in entries:
                content = filesystem.read_whole(
                    filesystem.join(os.fspath(directory), name), entries[name].size
                )
                crc = zlib.crc32(content, crc)
    return f"{crc:08x}"


def _allow_open_files(count: int) -> None:
    """Raises this process's limit on open files: the reader keeps one open for each shard."""
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        if hard < needed:
            raise UserError(
                f"{count} shards, and a process may open {hard} files; `ulimit -Hn {needed}` "
                "allows more"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class RecordSource:
    """The records of a split, by index. Several threads may ask. What is opened once, and has not
    changed since, is shared by all of a process."""

    def __init__(self, directory: str | os.PathLike, split: str):
        """
        Raises:
          UserError: the split is not there, or some of its shards are missing or damaged.
        """
        directory = os.fspath(directory)
        self._name = f"split {split!r} in {directory}"
        self.is_remote = filesystem.is_remote(directory)
        self._records = _open(
            directory if self.is_remote else os.path.abspath(directory), directory, split
        )
        self._lock = threading.Lock()
        self._coming: dict[int, futures.Future[bytes]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """
        Raises:
          UserError: the record is damaged.
          OSError: the bucket does not give it.
        """
        with self._lock:
            coming = self._coming.pop(index, None)
        try:
            return decode_record(coming.result() if coming else self._records[index])
        except (RuntimeError, UserError) as err:
            raise UserError(f"cannot read record {index} of {self._name} ({err}); {AGAIN}") from err

    def prefetch(self, index: int) -> None:
        """Begins to read a record of a bucket that will be asked for; of a disk it is read when it
        is."""
        if not self.is_remote:
            return
        with self._lock:
            if index not in self._coming:
                self._coming[index] = _pool().submit(self._records.__getitem__, index)
            while len(self._coming) > MAX_COMING:  # Nobody asked for the oldest.
                self._coming.pop(next(iter(self._coming))).cancel()


@functools.lru_cache(maxsize=1)
def _pool() -> futures.ThreadPoolExecutor:
    return futures.ThreadPoolExecutor(filesystem.THREADS, "records")


class _Instruction(NamedTuple):
    """What grain calls a FileInstruction: a file that need not be opened to be counted."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Ranges:
    """Records of shards in a bucket."""

    def __init__(self, paths: Sequence[str], known: Table):
        self._paths = paths
        self._table = known
        self._starts = np.append(0, np.cumsum(known.counts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> bytes:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        ends = self._table.ends(shard)
        place = index - int(self._starts[shard])
        content = filesystem.read_range(
            self._paths[shard], int(ends.begins[place]), int(ends.begins[place + 1])
        )
        return shard_ends.decode(ends, place, content)


def _open(place: str, directory: str, split: str) -> grain.sources.ArrayRecordDataSource | _Ranges:
    entries = filesystem.listing(place)
    names = shard_names(place, split)
    if not names:
        known = {name.split("-")[0] for name in entries if name.endswith(".array_record")}
        hint = nearest(split, known) if known else "; run `prepare` first"
        raise UserError(f"no shards of split {split!r} in {directory}{hint}")
    expected = int(names[0].removesuffix(".array_record").rsplit("-", 1)[1])
    if len(names) != expected:
        raise UserError(
            f"{directory} holds {len(names)} of {expected} shards of split {split!r}; {AGAIN}"
        )
    if not filesystem.is_remote(place):
        _allow_open_files(len(names))
    versions = tuple((name, entries[name]) for name in names)
    try:
        return _reader(place, split, versions, entries.get(table_name(split)))
    except (RuntimeError, OSError, UserError) as err:  # RuntimeError is all that the reader knows
        message = f"cannot read split {split!r} in {directory} ({err})"
        # What storage does not give, or refuses, is not to be deleted.
        is_damage = faults.kind_of(err) is Kind.DAMAGE
        raise faults.as_error(f"{message}; {AGAIN}" if is_damage else message, err) from err


@functools.lru_cache(maxsize=64)
def _reader(
    place: str, split: str, versions: tuple[tuple[str, Entry], ...], table: Entry | None
) -> grain.sources.ArrayRecordDataSource | _Ranges:
    """One for each state of a folder: `versions` of the shards and of the file of their ends, where
    there is one."""
    paths = [filesystem.join(place, name) for name, _ in versions]
    known = (
        _read_table(filesystem.join(place, table_name(split)), table, versions) if table else None
    )
    if filesystem.is_remote(place):
        if known is None:
            ends = filesystem.in_threads(
                lambda i: shard_ends.read_ends(paths[i], versions[i][1].size), range(len(paths))
            )
            known = shard_ends.table(ends)
        return _Ranges(paths, known)
    options = {"footer_prefetch_bytes": str(shard_ends.BLOCK + shard_ends.FOOTER_BYTES)}
    files = (
        paths
        if known is None
        else [
            _Instruction(path, 0, count, count)
            for path, count in zip(paths, known.counts.tolist(), strict=True)
        ]
    )
    return grain.sources.ArrayRecordDataSource(files, options)


def _read_table(path: str, entry: Entry, versions: tuple[tuple[str, Entry], ...]) -> Table:
    """Raises UserError where it is of other shards."""
    known = arrays.read(path, entry.size, Table._fields)
    sizes = [version.size for _, version in versions]
    if known["sizes"].tolist() != sizes:
        different = next(
            (i for i, size in enumerate(known["sizes"].tolist()) if [size] != sizes[i : i + 1]), 0
        )
        raise UserError(
            f"{path} is of other shards: {versions[different][0]} has "
            f"{versions[different][1].size:,} bytes"
        )
    return Table(**known)
