"""ArrayRecord shards of records, on disk or in a bucket: written in order, read at random."""

import contextlib
import functools
import os
import re
import resource
import threading
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
"""Number of open files that are left for everything but the shards."""

MAX_COMING = 1024
"""Most records of a split that are prefetched and not yet read."""

ENDINGS = (".array_record", ".npz")
# The folder has to go, because `prepare` finds nothing to do while there is a `prepare.json`.
AGAIN = "delete the folder and run `prepare` again"
ELSEWHERE = (
    "; run `prepare` first, or name the folder where they lie now, by --data or config.data.dir"
)


class NoSplit(UserError):
    """A folder has no such split."""


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


def split_names(files: Iterable[str]) -> dict[str, list[str]]:
    """Returns the splits that have shards among the names of files, sorted, each with those of its
    shards."""
    splits: dict[str, list[str]] = {}
    for name in sorted(files):
        # A split may have hyphens of its own.
        if found := re.fullmatch(r"(.+)-\d+-of-\d+\.array_record", name):
            splits.setdefault(found[1], []).append(name)
    return dict(sorted(splits.items()))


def shard_names(directory: str | os.PathLike, split: str) -> list[str]:
    """Returns the names of the shards of a split that exist, in order."""
    is_shard = re.compile(rf"{re.escape(split)}-\d+-of-\d+\.array_record").fullmatch
    return sorted(filter(is_shard, filesystem.listing(directory)))


def shard_paths(directory: str | Path, split: str) -> list[Path]:
    """Returns the paths of the shards of a split that exist in a local folder, in order."""
    return [Path(directory, name) for name in shard_names(directory, split)]


def table_name(split: str) -> str:
    """Returns the name of the file with the `shard_ends.Table` of a split."""
    return f"shards-{split}.npz"


def write_table(directory: Path, split: str) -> None:
    """Writes the file that says where the records of all shards of a split lie.

    Raises:
      UserError: a shard is damaged, or the file cannot be written.
    """
    entries = filesystem.listing(directory)
    names = shard_names(directory, split)
    # The table spares later readers a request (or the opening of a file) for each shard.
    ends = filesystem.in_threads(
        lambda name: shard_ends.read_ends(directory / name, entries[name].size), names
    )
    arrays.write(directory / table_name(split), shard_ends.table(ends)._asdict())


class ShardWriter:
    """A writer of a shard, for a `with` statement.

    The shard gets its name at the end of the block, so that a file of that name is always complete.
    A block that raises leaves no shard.
    """

    def __init__(self, path: str | Path):
        """Opens a temporary file beside `path`.

        Raises:
          UserError: the file cannot be written, as on a full disk; all methods raise it.
        """
        self._path = path
        self._beside = Path(f"{path}.tmp")
        with self._errors():
            # One record a group: a larger group is decompressed whole for every random read.
            self._writer = array_record_module.ArrayRecordWriter(str(self._beside), "group_size:1")

    def write(self, record: Record | bytes) -> None:
        """Appends a record, which may be encoded already."""
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
    """Writes records to a shard, which gets its name when it is complete."""
    with ShardWriter(path) as shard:
        for record in records:
            shard.write(record)


def read_shard(path: str | Path) -> Iterator[bytes]:
    """Yields the encoded records of a shard in order.

    Raises:
      UserError: the shard is damaged.
    """
    yield from read_records(path, None)


def read_records(path: str | Path, indexes: Iterable[int] | None) -> Iterator[bytes]:
    """Yields some encoded records of a shard by index; None yields all of them.

    Raises:
      UserError: the shard is damaged.
    """
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        for index in range(reader.num_records()) if indexes is None else indexes:
            yield reader.read([index])[0]
    except RuntimeError as err:
        raise UserError(f"cannot read {path} ({err}); {AGAIN}") from err


def _allow_open_files(count: int) -> None:
    """Raises the process's limit on open files, since the reader keeps every shard open.

    Raises:
      UserError: the system allows no such limit.
    """
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
    """The records of a split, by index; it may be used by several threads.

    Open shards are shared by all sources of a process, as long as the files do not change.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        """Opens a split in a folder.

        Raises:
          UserError: the split does not exist, or some of its shards are missing or damaged.
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

    def __iter__(self) -> Iterator[Record]:
        """Yields all records: Python itself would go on until an IndexError, which never comes."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Record:
        """Returns the record with this index.

        Raises:
          UserError: the record is damaged.
          OSError: the bucket does not deliver it.
        """
        # Taken out once: a record that is read again, in a later epoch, is a new request.
        with self._lock:
            coming = self._coming.pop(index, None)
        try:
            return decode_record(coming.result() if coming else self._records[index])
        except (RuntimeError, UserError) as err:
            raise UserError(f"cannot read record {index} of {self._name} ({err}); {AGAIN}") from err

    def prefetch(self, index: int) -> None:
        """Begins to read a record that will be needed soon, if it is in a bucket.

        On a disk it does nothing.
        """
        if not self.is_remote:
            return
        with self._lock:
            if index not in self._coming:
                self._coming[index] = _pool().submit(self._records.__getitem__, index)
            # Records that were prefetched and never read must not fill the memory: the oldest go
            # (a dict keeps the order of insertion).
            while len(self._coming) > MAX_COMING:
                self._coming.pop(next(iter(self._coming))).cancel()


@functools.lru_cache(maxsize=1)
def _pool() -> futures.ThreadPoolExecutor:
    """Returns the threads that prefetch records, shared by all sources of the process."""
    return futures.ThreadPoolExecutor(filesystem.THREADS, "records")


class _Instruction(NamedTuple):
    """A FileInstruction of grain: with it, a file need not be opened to count its records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Ranges:
    """The encoded records of shards in a bucket, by index; each is a single ranged read."""

    def __init__(self, paths: Sequence[str], known: Table):
        """Takes the paths of the shards, in the order of their table `known`."""
        self._paths = paths
        self._table = known
        self._starts = np.append(0, np.cumsum(known.counts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> bytes:
        # The last shard that starts at the record or before it; "right" passes over empty shards.
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        ends = self._table.ends(shard)
        place = index - int(self._starts[shard])
        content = filesystem.read_range(
            self._paths[shard], int(ends.begins[place]), int(ends.begins[place + 1])
        )
        return shard_ends.decode(ends, place, content)


def _open(place: str, directory: str, split: str) -> grain.sources.ArrayRecordDataSource | _Ranges:
    """Returns the encoded records of a split by index.

    Args:
      place: the folder's absolute path or URI.
      directory: the folder as the user names it, for messages.
      split: name of the split.

    Raises:
      UserError: the split does not exist, or some of its shards are missing or damaged.
    """
    entries = filesystem.listing(place)
    names = shard_names(place, split)
    if not names:
        known = {name.split("-")[0] for name in entries if name.endswith(".array_record")}
        hint = nearest(split, known) if known else ELSEWHERE
        raise NoSplit(f"no shards of split {split!r} in {directory}{hint}")
    # SPLIT-00000-of-00009: each name has the number of shards, so that missing ones are noticed.
    expected = int(names[0].removesuffix(".array_record").rsplit("-", 1)[1])
    if len(names) != expected:
        raise UserError(
            f"{directory} holds {len(names)} of {expected} shards of split {split!r}; {AGAIN}"
        )
    if not filesystem.is_remote(place):
        _allow_open_files(len(names))
    # Sizes and versions are part of the cache's key: rewritten shards are opened anew.
    versions = tuple((name, entries[name]) for name in names)
    try:
        return _reader(place, split, versions, entries.get(table_name(split)))
    except (RuntimeError, OSError, UserError) as err:  # the reader raises only RuntimeError
        message = f"cannot read split {split!r} in {directory} ({err})"
        # Only for damaged data: a folder that the storage does not deliver must not be deleted.
        is_damage = faults.kind_of(err) is Kind.DAMAGE
        raise faults.as_error(f"{message}; {AGAIN}" if is_damage else message, err) from err


@functools.lru_cache(maxsize=64)
def _reader(
    place: str, split: str, versions: tuple[tuple[str, Entry], ...], table: Entry | None
) -> grain.sources.ArrayRecordDataSource | _Ranges:
    """Returns the encoded records of a split, cached for one state of its folder.

    Args:
      place: the folder's absolute path or URI.
      split: name of the split.
      versions: name and entry of each shard.
      table: entry of the file with the shards' table; None if there is none.
    """
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
    # One read for the postscript and, of most shards, the footers.
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
    """Returns the table of shards in a file; raises UserError if it is of other shards."""
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
