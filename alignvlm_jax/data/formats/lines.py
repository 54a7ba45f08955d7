"""Files with a JSON object a line, read in ranges of bytes: a range holds the lines that begin in it."""

import io
import json
from collections.abc import Iterator
from typing import Any

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.formats.base import Rejection, Unit

SUFFIXES = (".jsonl", ".ndjson")
UNIT_RECORDS = 1000
MAX_UNITS = 500
"""Of a file, so that eight million records do not become thousands of shards."""

MAX_LINE_BYTES = 48 << 20
"""Parsed, a line of nothing but brackets takes thirty times as much."""

SAMPLE_BYTES = 1 << 20


def units(path: str) -> list[Unit]:
    """Returns ranges of about `UNIT_RECORDS` lines, by the length of the file's first ones."""
    size = filesystem.size(path)
    with filesystem.open_file(path) as file:
        sample = file.read(min(size, SAMPLE_BYTES))
    step = max(UNIT_RECORDS * len(sample) // (sample.count(b"\n") or 1), -(-size // MAX_UNITS), 1)
    return [Unit(path, start, min(start + step, size)) for start in range(0, size, step)]


def objects(unit: Unit) -> Iterator[tuple[str, dict[str, Any]] | Rejection]:
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
            where, at = f"{name}-{at}", at + len(line)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                at += _skip_line(file)
                yield Rejection(where, f"a line is too long (at most {MAX_LINE_BYTES:,} bytes)")
            elif line.strip():
                yield parse(where, line)


def parse(where: str, line: bytes) -> tuple[str, dict[str, Any]] | Rejection:
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
