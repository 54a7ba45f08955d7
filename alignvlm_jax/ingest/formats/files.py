"""Files that data sets are made of: lines of JSON, and the images that a record names or holds."""

import base64
import binascii
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from alignvlm_jax.data import filesystem
from alignvlm_jax.ingest.formats.base import Reject, Rejection, Unit
from alignvlm_jax.storage import faults

MAX_BYTES = 256 << 20
"""Of an image, and of all images of a record together, which are in memory several times."""

MAX_PATH = 4096
"""Characters; a longer text is base64."""


def images(folder: str, names: Iterable[str]) -> tuple[bytes, ...]:
    """Returns the bytes of the images of a record; see `image`.

    Raises:
      Reject: also where they are too large together.
    """
    found = []
    room = MAX_BYTES
    for name in names:
        found.append(image(folder, name, room))
        room -= len(found[-1])
    return tuple(found)


def image(folder: str, name: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the bytes of an image by its path from `folder`, or of its base64: a data URI, or a
    text that is too long for a path.

    Raises:
      Reject: there is no such file, or no such base64, or it is too large.
      UserError: a bucket does not answer. That is no fault of the record, and the run may go on
        later.
    """
    if name.startswith("data:") or len(name) > MAX_PATH:
        return _decode(name.partition("base64,")[2] if name.startswith("data:") else name)
    path = filesystem.join(folder, name)
    if not filesystem.is_readable(path):
        raise Reject(f"an image is neither local nor on gs:// ({name})")
    try:
        return filesystem.read(path, max_bytes)
    except FileNotFoundError as err:
        raise Reject(f"an image is missing ({name})") from err
    except ValueError as err:
        raise Reject(f"an image file cannot be read ({name}: {err})") from err
    except OSError as err:
        if filesystem.is_remote(path):
            raise faults.as_error(
                f"cannot read {path}: {err}; the same command goes on", err
            ) from err
        raise Reject(f"an image file cannot be read ({name}: {err.strerror or err})") from err


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise Reject(f"an image is no base64 ({err})") from err


SUFFIXES = (".jsonl", ".ndjson")
UNIT_RECORDS = 1000
MAX_UNITS = 500
"""Of a file, so that eight million records do not become thousands of shards."""

MAX_LINE_BYTES = 48 << 20
"""Parsed, a line of nothing but brackets takes thirty times as much."""

SAMPLE_BYTES = 1 << 20


def line_units(path: str) -> list[Unit]:
    """Returns ranges of about `UNIT_RECORDS` lines, by the length of the file's first ones."""
    size = filesystem.size(path)
    with filesystem.open_file(path) as file:
        sample = file.read(min(size, SAMPLE_BYTES))
    step = max(UNIT_RECORDS * len(sample) // (sample.count(b"\n") or 1), -(-size // MAX_UNITS), 1)
    return [Unit(path, start, min(start + step, size)) for start in range(0, size, step)]


def json_objects(unit: Unit) -> Iterator[tuple[str, dict[str, Any]] | Rejection]:
    """Reads the objects of a range, each with a name of where it lies: `FILE-BYTE`."""
    name = filesystem.stem(unit.path)
    # From a byte before, to see whether a line begins at `start` itself.
    at = max(unit.start - 1, 0)
    with filesystem.open_buffered(unit.path, at) as file:
        if unit.start:
            at += _skip_line(file)
        while at < unit.stop:
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            where = f"{name}-{at}"
            at = at + len(line)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                at += _skip_line(file)
                yield Rejection(where, f"a line is too long (at most {MAX_LINE_BYTES:,} bytes)")
            elif line.strip():
                yield parse_json(where, line)


def parse_json(where: str, line: bytes) -> tuple[str, dict[str, Any]] | Rejection:
    """Parses one object."""
    try:
        value = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode())
    except UnicodeDecodeError as err:
        return Rejection(where, f"invalid UTF-8 ({err.reason} at byte {err.start})")
    except (ValueError, RecursionError) as err:
        return Rejection(where, f"no JSON ({err})")
    return (where, value) if isinstance(value, dict) else Rejection(where, "no JSON object")


def _skip_line(file: io.BufferedReader) -> int:
    """Skips what is left of a line, however long; returns its bytes."""
    skipped = 0
    while part := file.readline(SAMPLE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
