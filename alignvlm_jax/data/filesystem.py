"""Files of data, on this machine or in a bucket (gs://).

Sources of `prepare` are read through pyarrow, from front to back. What training reads of a bucket
are ranges, through `storage`: one request each and none to open. pyarrow asks for a file's metadata
first, and a `seek` holds Python's lock while it begins to read the whole file.
"""

import functools
import io
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.storage import bucket, faults
from alignvlm_jax.storage.faults import Kind

SCHEMES = ("gs", "gcs")
RETRY_SECONDS = 15  # pyarrow's own is 15 minutes, of silence
BUFFER_BYTES = 1 << 20
RANGE_BYTES = 8 << 20
"""Of a large file that is read whole: a request each, many at a time."""
THREADS = 64
"""Requests at a time: at 50 ms a read, 1,280 a second."""
LISTING_SECONDS = 30
"""For so long the listing of a folder in a bucket is taken as it was."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Entry(NamedTuple):
    """A file of a folder."""

    size: int
    version: str  # another one where the file was written anew


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URI of a bucket."""
    return "://" in os.fspath(path)


def is_readable(path: str) -> bool:
    """Whether a path is local or on a bucket of a kind that is read."""
    return not is_remote(path) or path.partition("://")[0] in SCHEMES


def list_files(source: str, suffixes: tuple[str, ...]) -> list[str]:
    """Returns `source` itself where it is a file, else the files below it with these endings (any
    case), sorted.

    Raises:
      UserError: it is not there, it has no such files, or its bucket cannot be reached.
    """
    info = _info(source)
    if info.type == fs.FileType.File:
        return [source]
    if info.type == fs.FileType.NotFound:
        raise UserError(f"no source {source}{_similar(source)}")
    files, path = _resolve(source)
    try:
        found = files.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as err:
        raise faults.as_error(f"cannot list {source}: {_reason(err)}", err) from err
    prefix = source.partition("://")[0] + "://" if is_remote(source) else ""
    names = [prefix + item.path for item in found if item.type == fs.FileType.File]
    wanted = sorted(name for name in names if name.lower().endswith(suffixes))
    if not wanted:
        raise UserError(
            f"{source} holds no file that ends in {' or '.join(suffixes)} ({len(names)} others)"
        )
    return wanted


def raise_if_passing(path: str, err: Exception) -> None:
    """Raises TryAgainError where an error of reading a file is one of a bucket that does not
    answer: it says nothing about the file, the rest of which would be left out for good."""
    if is_remote(path) and faults.kind_of(err) is Kind.PASSING:
        raise faults.as_error(
            f"cannot read {path} ({_reason(err)}); the same command goes on", err
        ) from err


def size(path: str) -> int:
    """Returns the bytes of a file; UserError where there is none."""
    info = _info(path)
    if info.type != fs.FileType.File:
        raise UserError(f"{path} is no file")
    return info.size


def open_file(path: str) -> pa.NativeFile:
    """Opens a file to read anywhere in it; UserError where it cannot be."""
    files, inner = _resolve(path)
    try:
        return files.open_input_file(inner)
    except (OSError, pa.ArrowInvalid) as err:
        raise faults.as_error(f"cannot open {path}: {_reason(err)}", err) from err


def open_buffered(path: str, start: int = 0) -> io.BufferedReader:
    """Opens a file to read on from a byte."""
    file = open_file(path)
    file.seek(start)
    return io.BufferedReader(file, BUFFER_BYTES)


def read(path: str, max_bytes: int) -> bytes:
    """Returns the bytes of a file.

    Raises:
      FileNotFoundError: there is no file of that name.
      ValueError: it has more than `max_bytes`.
      OSError: it cannot be read.
    """
    files, inner = _resolve(path)
    info = files.get_file_info(inner)
    if info.type != fs.FileType.File:  # a folder or a device would be read without end
        raise FileNotFoundError(path)
    if info.size > max_bytes:
        raise ValueError(f"{info.size:,} bytes; at most {max_bytes:,}")
    with files.open_input_file(inner) as file:
        return file.read()


def listing(folder: str | os.PathLike) -> Mapping[str, Entry]:
    """Returns the files of a folder by name, without those of folders in it; none where there is no
    such folder. What it says of a bucket may be `LISTING_SECONDS` old.

    Raises:
      UserError: its bucket cannot be reached, or is not there.
    """
    folder = os.fspath(folder)
    if is_remote(folder):
        return _remote_listing(folder, int(time.monotonic() // LISTING_SECONDS))
    try:
        with os.scandir(folder) as found:
            stats = {item.name: item.stat() for item in found if item.is_file()}
    except OSError:
        return {}
    return {
        name: Entry(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}")
        for name, stat in stats.items()
    }


def read_range(path: str | os.PathLike, begin: int, end: int) -> bytes:
    """Returns the bytes of a file from `begin` to before `end`, by one request.

    Faults that pass are tried again.

    Raises:
      OSError: it cannot be read, or it is shorter.
    """
    path = os.fspath(path)
    if is_remote(path):
        content = _bucket(path).cat_file(path, begin, end) if begin < end else b""
    else:
        with open(path, "rb") as file:
            content = os.pread(file.fileno(), end - begin, begin)
    if len(content) != end - begin:
        raise OSError(
            f"cannot read {path}: it ends {end - begin - len(content)} bytes before byte {end}"
        )
    return content


def read_whole(path: str | os.PathLike, size: int) -> bytes:
    """Returns the bytes of a file of known size; OSError where it cannot be read."""
    if not is_remote(path):
        return read_range(path, 0, size)
    begins = range(0, size, RANGE_BYTES)
    return b"".join(
        in_threads(lambda begin: read_range(path, begin, min(begin + RANGE_BYTES, size)), begins)
    )


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Returns the function's results of all items, many waited for at a time."""
    with futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def join(folder: str, name: str) -> str:
    """Returns the path of a file in a folder; a `name` that is absolute or a URI stands for
    itself."""
    return name if is_remote(name) else posixpath.join(folder, posixpath.normpath(name))


def parent(path: str) -> str:
    """Returns the folder that a file lies in."""
    return posixpath.dirname(path)


def name(path: str) -> str:
    """Returns a file's name without its folder."""
    return posixpath.basename(path)


def stem(path: str) -> str:
    """Returns a file's name without its folder and ending."""
    return posixpath.basename(path).partition(".")[0]


@functools.lru_cache(maxsize=8)
def _filesystem(scheme: str) -> fs.FileSystem:
    if not scheme:
        return fs.LocalFileSystem()
    if scheme not in SCHEMES:
        raise UserError(f"cannot read {scheme}:// paths; known: local paths and gs://")
    # A server on this machine, of tests, knows no accounts.
    user = "anonymous@" if "CLOUD_STORAGE_EMULATOR_ENDPOINT" in os.environ else ""
    return fs.FileSystem.from_uri(f"{scheme}://{user}bucket/?retry_limit_seconds={RETRY_SECONDS}")[
        0
    ]


@functools.lru_cache(maxsize=32)
def _remote_listing(folder: str, time_slot: int) -> Mapping[str, Entry]:
    try:
        found = _bucket(folder).ls(folder, detail=True)
    except FileNotFoundError as err:
        if err.strerror == "no such bucket":  # a folder is only a beginning of names
            raise UserError(f"cannot list {folder}: {err.strerror}") from err
        return {}
    except OSError as err:
        raise faults.as_error(f"cannot list {folder}: {err.strerror or err}", err) from err
    files = [item for item in found if item["type"] == "file"]
    return {
        posixpath.basename(item["name"]): Entry(item["size"], str(item["generation"]))
        for item in files
    }


def _bucket(path: str) -> Any:
    storage.path(path)  # raises where it is of another kind of storage
    return bucket.filesystem()


def _resolve(path: str) -> tuple[fs.FileSystem, str]:
    scheme, separator, inner = path.partition("://")
    return (_filesystem(scheme), inner) if separator else (_filesystem(""), path)


def _info(path: str) -> fs.FileInfo:
    files, inner = _resolve(path)
    try:
        return files.get_file_info(inner)
    except (OSError, pa.ArrowInvalid) as err:
        raise faults.as_error(f"cannot reach {path}: {_reason(err)}", err) from err


def _similar(source: str) -> str:
    if is_remote(source) or not Path(source).parent.is_dir():
        return ""
    return nearest(Path(source).name, [path.name for path in Path(source).parent.iterdir()])


def _reason(err: Exception) -> str:
    return " ".join(str(err).split())[:200]
