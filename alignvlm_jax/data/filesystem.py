"""Access to files of data, on this machine or in a bucket (gs://).

Sources of `prepare` are read through pyarrow, from front to back. Training reads ranges of a
bucket's files through `storage`, by one request each and none to open. pyarrow would ask for a
file's metadata first, and its `seek` holds the GIL while it begins to read the whole file.
"""

import errno
import functools
import io
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError, nearest, one_line
from alignvlm_jax.storage import bucket, faults
from alignvlm_jax.storage.faults import Kind

SCHEMES = ("gs", "gcs")
# pyarrow's default is 15 minutes, in which it says nothing.
RETRY_SECONDS = 15
BUFFER_BYTES = 1 << 20
RANGE_BYTES = 8 << 20
"""Bytes of each of the concurrent requests by which a large file is read whole."""
THREADS = 64
"""Number of concurrent requests: at 50 ms a read, 1,280 a second."""
LISTING_SECONDS = 30
"""Time for which the listing of a folder in a bucket is cached."""

Item = TypeVar("Item")
Result = TypeVar("Result")


MISNAMED = "the file's name is no UTF-8; rename it"
DEAD_LINK = "a link that leads nowhere, or to itself"


class Entry(NamedTuple):
    """An entry of the listing of a folder: a file's size in bytes, and its version."""

    size: int
    version: str  # changes when the file is written anew


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URI of a bucket."""
    return "://" in os.fspath(path)


def is_readable(path: str) -> bool:
    """Whether a path is local or in a bucket of a supported kind."""
    return not is_remote(path) or path.partition("://")[0] in SCHEMES


def list_files(source: str, suffixes: tuple[str, ...]) -> list[str]:
    """Returns the files of a source: itself if it is a file, else the files below it, sorted.

    Args:
      source: a file or a folder, local or in a bucket.
      suffixes: endings, in lower case, of the files of a folder; the case of names does not matter.

    Raises:
      UserError: the source does not exist, has no such files, or its bucket cannot be reached.
    """
    info = _info(source)
    if info.type == fs.FileType.File:
        return [source]
    if info.type == fs.FileType.NotFound:
        if not is_remote(source) and os.path.islink(source):
            raise UserError(f"{source} is {DEAD_LINK}")
        raise UserError(f"no source {source}{_similar(source)}")
    names = _files_below(source)
    wanted = [name for name in names if name.lower().endswith(suffixes)]
    readable = sorted(filter(is_utf8, wanted))
    if not readable:
        ending = f" that ends in {' or '.join(suffixes)}" if any(suffixes) else ""
        others = f" ({len(names) - len(wanted):,} others)" if names else ": it is empty"
        if unusable := unusable_files(source, suffixes):
            path, reason = unusable[0]
            others = f" but {len(unusable):,} that nothing can open, as {path}: {reason}"
        raise UserError(f"{source} holds no file{ending}{others}")
    return readable


def unusable_files(source: str, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns the files of a local folder that `list_files` leaves out although they end so, by
    their escaped names, and why: names that are no UTF-8, and links that lead to no file."""
    if is_remote(source) or not os.path.isdir(source):
        return []
    found = [(escaped(path), MISNAMED) for path in _files_below(source) if not is_utf8(path)]
    found += [(escaped(path), DEAD_LINK) for path in _walk(source, frozenset(), is_dead=True)]
    return sorted(one for one in found if one[0].lower().endswith(suffixes))


def is_utf8(path: str) -> bool:
    """Whether a path can be written as UTF-8, which pyarrow, JSON and protocols need."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(path: str) -> str:
    """Returns a path for a message, the bytes of it that are no UTF-8 as `\\xe9`."""
    try:
        return os.fsencode(path).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and no file name has
        return path.encode(errors="backslashreplace").decode()


def _files_below(source: str) -> list[str]:
    """Returns all files below a folder; raises UserError if it cannot be listed."""
    try:
        if not is_remote(source):
            return list(_walk(source, frozenset()))
        files, path = _resolve(source)
        found = files.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as err:
        raise faults.as_error(f"cannot list {source}: {one_line(err)}", err) from err
    # pyarrow's paths lack the scheme of the URI.
    prefix = source.partition("://")[0] + "://"
    return [prefix + item.path for item in found if item.type == fs.FileType.File]


def _walk(
    folder: str, above: frozenset[tuple[int, int]], *, is_dead: bool = False
) -> Iterator[str]:
    """Yields the files below a local folder, of which `above` are the folders around it; with
    `is_dead` in their place the links that lead nowhere, or to themselves."""
    # pyarrow would do, but for names that are no UTF-8 and for links to a folder around.
    # By number, since a link gives a folder another name each time that it is followed.
    stat = os.stat(folder)
    here = stat.st_dev, stat.st_ino
    if here in above:
        return
    with os.scandir(folder) as items:
        for item in items:
            if _leads_to(item.is_dir):
                yield from _walk(item.path, above | {here}, is_dead=is_dead)
                continue
            is_file = _leads_to(item.is_file)
            if (item.is_symlink() and not os.path.exists(item.path)) if is_dead else is_file:
                yield item.path


def _leads_to(kind: Callable[[], bool]) -> bool:
    """Returns what `is_file` or `is_dir` of an entry says; False for a link to itself, of which it
    raises an error."""
    try:
        return kind()
    except OSError as err:
        if err.errno != errno.ELOOP:
            raise
        return False


def raise_if_passing(path: str, err: Exception) -> None:
    """Raises TryAgainError if an error of reading a file comes from a bucket that does not answer.

    Such an error says nothing about the file. Taken for damage, the rest of the file would be left
    out for good.
    """
    if is_remote(path) and faults.kind_of(err) is Kind.PASSING:
        raise faults.as_error(
            f"cannot read {path} ({one_line(err)}); the same command goes on", err
        ) from err


def size(path: str) -> int:
    """Returns the size of a file in bytes; raises UserError if there is no such file."""
    return entry(path).size


def entry(path: str) -> Entry:
    """Returns the size of a file, and when it was written; UserError if there is no such file."""
    info = _info(path)
    if info.type != fs.FileType.File:
        raise UserError(f"{path} is no file")
    return Entry(info.size, str(info.mtime_ns))


def open_file(path: str) -> pa.NativeFile:
    """Returns an open file with random access; raises UserError if it cannot be opened."""
    files, inner = _resolve(path)
    try:
        return files.open_input_file(inner)
    except (OSError, pa.ArrowInvalid) as err:
        raise faults.as_error(f"cannot open {path}: {one_line(err)}", err) from err


def open_buffered(path: str, start: int = 0) -> io.BufferedReader:
    """Returns an open file to read from byte `start` onwards."""
    file = open_file(path)
    file.seek(start)
    return io.BufferedReader(file, BUFFER_BYTES)


def read(path: str, max_bytes: int) -> bytes:
    """Returns the content of a file.

    Raises:
      FileNotFoundError: there is no file of that name.
      ValueError: the file has more than `max_bytes`.
      OSError: the file cannot be read.
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
    """Returns the files directly in a folder by name; none if there is no such folder.

    The listing of a folder in a bucket may be `LISTING_SECONDS` old.

    Raises:
      UserError: the bucket cannot be reached, or does not exist.
    """
    folder = os.fspath(folder)
    if is_remote(folder):
        # The number of the present interval is an argument of the cached function: in the next one
        # it misses the cache.
        return _remote_listing(folder, int(time.monotonic() // LISTING_SECONDS))
    try:
        with os.scandir(folder) as found:
            stats = {item.name: item.stat() for item in found if _leads_to(item.is_file)}
    except OSError:
        return {}
    # With the inode, because a file that is replaced twice within the clock's resolution keeps its
    # time.
    return {
        name: Entry(stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}")
        for name, stat in stats.items()
    }


def read_range(path: str | os.PathLike, begin: int, end: int) -> bytes:
    """Returns bytes `begin` to `end` (exclusive) of a file, by a single request.

    Temporary faults are retried.

    Raises:
      OSError: the file cannot be read, or is shorter.
    """
    path = os.fspath(path)
    if is_remote(path):
        content = _bucket(path).cat_file(path, begin, end) if begin < end else b""
    else:
        with open(path, "rb") as file:
            content = os.pread(file.fileno(), end - begin, begin)
    # Beyond the end of a file both give only what there is, without an error.
    if len(content) != end - begin:
        raise OSError(
            f"cannot read {path}: it ends {end - begin - len(content)} bytes before byte {end}"
        )
    return content


def read_whole(path: str | os.PathLike, size: int) -> bytes:
    """Returns the content of a file of known size; raises OSError if it cannot be read."""
    if not is_remote(path):
        return read_range(path, 0, size)
    begins = range(0, size, RANGE_BYTES)
    return b"".join(
        in_threads(lambda begin: read_range(path, begin, min(begin + RANGE_BYTES, size)), begins)
    )


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Returns function(item) of all items in their order, computed on `THREADS` threads."""
    with futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def join(folder: str, name: str) -> str:
    """Returns the path of a file in a folder; an absolute name, or a URI, stands for itself."""
    return name if is_remote(name) else posixpath.join(folder, posixpath.normpath(name))


def parent(path: str) -> str:
    """Returns the path of the folder of a file."""
    return posixpath.dirname(path)


def name(path: str) -> str:
    """Returns the name of a file without its folder."""
    return posixpath.basename(path)


def stem(path: str) -> str:
    """Returns the name of a file without its folder, up to its first dot."""
    return posixpath.basename(path).partition(".")[0]


@functools.lru_cache(maxsize=8)
def _filesystem(scheme: str) -> fs.FileSystem:
    """Returns pyarrow's filesystem for the scheme of a URI; "" is this machine's."""
    if not scheme:
        return fs.LocalFileSystem()
    if scheme not in SCHEMES:
        raise UserError(f"cannot read {scheme}:// paths; known: local paths and gs://")
    # The emulator of tests has no accounts.
    user = "anonymous@" if "CLOUD_STORAGE_EMULATOR_ENDPOINT" in os.environ else ""
    return fs.FileSystem.from_uri(f"{scheme}://{user}bucket/?retry_limit_seconds={RETRY_SECONDS}")[
        0
    ]


@functools.lru_cache(maxsize=32)
def _remote_listing(folder: str, time_slot: int) -> Mapping[str, Entry]:
    """Returns the listing of a folder in a bucket, cached for one time slot."""
    try:
        found = _bucket(folder).ls(folder, detail=True)
    except FileNotFoundError as err:
        # In a bucket a folder is only a prefix of names: a missing one is as good as empty, but a
        # missing bucket is a mistake.
        if err.strerror == "no such bucket":
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
    """Returns the filesystem of buckets; raises UserError for another kind of storage."""
    storage.path(path)
    return bucket.filesystem()


def _resolve(path: str) -> tuple[fs.FileSystem, str]:
    """Returns pyarrow's filesystem of a path or URI, and the path within it."""
    if not is_utf8(path):
        raise UserError(f"the name {escaped(path)} is no UTF-8; rename it")
    scheme, separator, inner = path.partition("://")
    if separator and scheme in SCHEMES and not inner.partition("/")[0]:
        raise UserError(f"{path} names no bucket; expected {scheme}://BUCKET/NAME")
    return (_filesystem(scheme), inner) if separator else (_filesystem(""), path)


def _info(path: str) -> fs.FileInfo:
    """Returns what is at a path; raises UserError if its storage cannot be reached."""
    files, inner = _resolve(path)
    try:
        return files.get_file_info(inner)
    except (OSError, pa.ArrowInvalid) as err:
        raise faults.as_error(f"cannot reach {path}: {one_line(err)}", err) from err


def _similar(source: str) -> str:
    """Returns a hint at similar names in the folder of a local source, for messages."""
    if is_remote(source) or not Path(source).parent.is_dir():
        return ""
    return nearest(Path(source).name, [path.name for path in Path(source).parent.iterdir()])
