"""Records on disk: ArrayRecord shards, written one by one, read at random."""

import contextlib
import os
import resource
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import grain
from array_record.python import array_record_module

from alignvlm_jax import storage
from alignvlm_jax.data.schema import Record, decode_record, encode_record
from alignvlm_jax.errors import UserError, nearest

SPARE_FILES = 512
"""Open files that everything but the shards may need."""

AGAIN = "delete the folder and run `prepare` again"  # which finds nothing to do while `prepare.json` stands


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


def shard_paths(directory: str | Path, split: str) -> list[Path]:
    """Returns the shards of a split that are there, in order."""
    return sorted(Path(directory).glob(f"{split}-[0-9]*-of-[0-9]*.array_record"))


class ShardWriter:
    """Writes one shard, beside `path` first: a file of that name is always whole. For a `with` statement; what raises
    within leaves no shard."""

    def __init__(self, path: str | Path):
        """
        Raises:
          UserError: the file cannot be written; so do all methods, as on a full disk.
        """
        self._path, self._beside = path, Path(f"{path}.tmp")
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


def fingerprint(*directories: str | Path) -> str:
    """Returns a checksum of what `prepare` was asked for and of the tokenizer, in every folder: other data have another
    one. Where there is neither it is that of nothing."""
    crc = 0
    names = ("prepare.json", "tokenizer.model")
    for path in (storage.path(directory) / name for directory in directories for name in names):
        crc = zlib.crc32(path.read_bytes() if path.exists() else b"", crc)
    return f"{crc:08x}"


def _allow_open_files(count: int) -> None:
    """Raises this process's limit on open files: the reader keeps one open for each shard."""
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        if hard < needed:
            raise UserError(f"{count} shards, and a process may open {hard} files; `ulimit -Hn {needed}` allows more")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class RecordSource:
    """The records of a split, by index."""

    def __init__(self, directory: str | Path, split: str):
        """
        Raises:
          UserError: the split is not there, or some of its shards are missing or damaged.
        """
        paths = shard_paths(directory, split)
        if not paths:
            known = {path.name.split("-")[0] for path in Path(directory).glob("*-of-*.array_record")}
            hint = nearest(split, known) if known else "; run `prepare` first"
            raise UserError(f"no shards of split {split!r} in {directory}{hint}")
        expected = int(paths[0].stem.rsplit("-", 1)[1])
        if len(paths) != expected:
            raise UserError(f"{directory} holds {len(paths)} of {expected} shards of split {split!r}; {AGAIN}")
        _allow_open_files(len(paths))
        self._name = f"split {split!r} in {directory}"
        try:
            self._source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        except RuntimeError as err:  # all that the reader knows
            raise UserError(f"cannot read {self._name} ({err}); {AGAIN}") from err

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        """
        Raises:
          UserError: the record is damaged.
        """
        try:
            return decode_record(self._source[index])
        except (RuntimeError, UserError) as err:
            raise UserError(f"cannot read record {index} of {self._name} ({err}); {AGAIN}") from err
