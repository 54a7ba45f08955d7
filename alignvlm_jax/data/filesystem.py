"""Source files, on this machine or in a bucket (gs://), through pyarrow."""

import functools
import io
import posixpath
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from alignvlm_jax.errors import UserError, nearest

SCHEMES = ("gs", "gcs")
RETRY_SECONDS = 15  # pyarrow's own is 15 minutes, of silence
BUFFER_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Whether a path is a URI of a bucket."""
    return "://" in path


def is_readable(path: str) -> bool:
    """Whether a path is local or on a bucket of a kind that is read."""
    return not is_remote(path) or path.partition("://")[0] in SCHEMES


def list_files(source: str, suffixes: tuple[str, ...]) -> list[str]:
    """Returns `source` itself where it is a file, else the files below it with these endings (any case), sorted.

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
        raise UserError(f"cannot list {source}: {_reason(err)}") from err
    prefix = source.partition("://")[0] + "://" if is_remote(source) else ""
    names = [prefix + item.path for item in found if item.type == fs.FileType.File]
    wanted = sorted(name for name in names if name.lower().endswith(suffixes))
    if not wanted:
        raise UserError(f"{source} holds no file that ends in {' or '.join(suffixes)} ({len(names)} others)")
    return wanted


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
        raise UserError(f"cannot open {path}: {_reason(err)}") from err


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


def join(folder: str, name: str) -> str:
    """Returns the path of a file in a folder; a `name` that is absolute or a URI stands for itself."""
    return name if is_remote(name) else posixpath.join(folder, posixpath.normpath(name))


def parent(path: str) -> str:
    """Returns the folder that a file lies in."""
    return posixpath.dirname(path)


def stem(path: str) -> str:
    """Returns a file's name without its folder and ending."""
    return posixpath.basename(path).partition(".")[0]


@functools.lru_cache(maxsize=8)
def _filesystem(scheme: str) -> fs.FileSystem:
    if not scheme:
        return fs.LocalFileSystem()
    if scheme not in SCHEMES:
        raise UserError(f"cannot read {scheme}:// paths; known: local paths and gs://")
    return fs.FileSystem.from_uri(f"{scheme}://bucket/?retry_limit_seconds={RETRY_SECONDS}")[0]


def _resolve(path: str) -> tuple[fs.FileSystem, str]:
    scheme, separator, inner = path.partition("://")
    return (_filesystem(scheme), inner) if separator else (_filesystem(""), path)


def _info(path: str) -> fs.FileInfo:
    files, inner = _resolve(path)
    try:
        return files.get_file_info(inner)
    except (OSError, pa.ArrowInvalid) as err:
        raise UserError(f"cannot reach {path}: {_reason(err)}") from err


def _similar(source: str) -> str:
    if is_remote(source) or not Path(source).parent.is_dir():
        return ""
    return nearest(Path(source).name, [path.name for path in Path(source).parent.iterdir()])


def _reason(err: Exception) -> str:
    return " ".join(str(err).split())[:200]
