"""Records on disk: ArrayRecord shards, written one by one, read at random."""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import grain
from array_record.python import array_record_module

from alignvlm_jax.data.schema import Record, decode_record, encode_record
from alignvlm_jax.errors import UserError, nearest

AGAIN = "delete the folder and run `prepare` again"  # which finds nothing to do while `prepare.json` stands


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}-{index:05d}-of-{count:05d}.array_record"


def shard_paths(directory: str | Path, split: str) -> list[Path]:
    """Returns the shards of a split that are there, in order."""
    return sorted(Path(directory).glob(f"{split}-[0-9]*-of-[0-9]*.array_record"))


def write_shard(path: str | Path, records: Iterable[Record]) -> None:
    """Writes records to one shard, beside `path` first: a file of that name is always whole.

    Raises:
      UserError: the file cannot be written, as on a full disk.
    """
    beside = Path(f"{path}.tmp")
    try:
        # One record a group: a larger group is decompressed whole for every random read.
        writer = array_record_module.ArrayRecordWriter(str(beside), "group_size:1")
        for record in records:
            writer.write(encode_record(record))
        writer.close()
        os.replace(beside, path)
    except (RuntimeError, OSError) as err:  # the writer knows RuntimeError alone
        raise UserError(f"cannot write {path}: {err}") from err
    finally:
        beside.unlink(missing_ok=True)


def fingerprint(*directories: str | Path) -> str:
    """Returns a checksum of what `prepare` was asked for and of the tokenizer, in every folder: other data have another
    one. Where there is neither it is that of nothing."""
    crc = 0
    for path in (Path(directory, name) for directory in directories for name in ("prepare.json", "tokenizer.model")):
        crc = zlib.crc32(path.read_bytes() if path.exists() else b"", crc)
    return f"{crc:08x}"


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
