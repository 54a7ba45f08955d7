"""Files of one JSON array of objects, however large: a window moves over the file, and no more of
it is in memory."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from alignvlm_jax.data import filesystem
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Rejection, Unit

CHUNK_BYTES = 1 << 20
MAX_ELEMENT_BYTES = 16 << 20
SEPARATORS = re.compile(r"[\s,\[]*")
BETWEEN = re.compile(r"\}\s*,\s*(?=\{)")


class _Window:
    """A stretch of a file as Latin-1: a character is a byte there, and no byte of UTF-8's looks
    like JSON's marks."""

    def __init__(self, file: io.BufferedReader, start: int):
        self._file = file
        self.start = start
        self.text = ""

    def grow(self, at: int) -> bool:
        """Drops what lies before `at`, which becomes 0, and reads on; False at the file's end."""
        self.text = self.text[at:]
        self.start = self.start + at
        # doubles: long elements are not parsed too often
        more = self._file.read(max(CHUNK_BYTES, len(self.text)))
        self.text += more.decode("latin-1")
        return bool(more)

    def decode(self, at: int) -> tuple[Any, int] | None:
        """Returns the value that begins at `at`, and where it ends; None where it is broken or not
        all there."""
        try:
            return json.JSONDecoder().raw_decode(self.text, at)
        except (ValueError, RecursionError):
            return None


def units(path: str, key: str) -> list[Unit]:
    """Returns ranges of bytes that hold `files.UNIT_RECORDS` elements, or more of large files.
    Their first bytes begin an element (or what is broken); `key` as in `objects`."""
    size = filesystem.size(path)
    min_bytes = size // files.MAX_UNITS
    starts = [0]
    count = 0
    for start, _ in _elements(path, 0, size, key):
        if count >= files.UNIT_RECORDS and start - starts[-1] >= min_bytes:
            starts.append(start)
            count = 0
        count += 1
    return [
        Unit(path, start, stop) for start, stop in zip(starts, [*starts[1:], size], strict=True)
    ]


def objects(unit: Unit, key: str) -> Iterator[tuple[str, dict[str, Any]] | Rejection]:
    """Reads the objects of a range, each with a name of where it lies: `FILE-BYTE`. After something
    broken it goes on with the next object that has `key`."""
    name = filesystem.stem(unit.path)
    for start, element in _elements(unit.path, unit.start, unit.stop, key):
        where = f"{name}-{start}"
        yield (
            Rejection(where, "no JSON from here to the next record")
            if element is None
            else files.parse_json(where, element)
        )


def _elements(path: str, start: int, stop: int, key: str) -> Iterator[tuple[int, bytes | None]]:
    """Yields the elements that begin before byte `stop`, as (first byte, bytes), with None for a
    broken stretch."""
    with filesystem.open_buffered(path, start) as file:
        window = _Window(file, start)
        at = 0
        while True:
            at = SEPARATORS.match(window.text, at).end()
            if at == len(window.text):
                if not window.grow(at):
                    return
                at = 0
                continue
            begin = window.start + at
            if begin >= stop or window.text[at] == "]":
                return
            decoded = window.decode(at)
            if decoded:
                yield begin, window.text[at : decoded[1]].encode("latin-1")
                at = decoded[1]
            elif len(window.text) - at < MAX_ELEMENT_BYTES and window.grow(at):
                at = 0
            else:
                yield begin, None
                at = _next_object(window, at if window.start + at == begin else 0, key)


def _next_object(window: _Window, at: int, key: str) -> int:
    """Returns where the next object with `key` begins, or the file's end."""
    while True:
        match = BETWEEN.search(window.text, at)
        if match is None or len(window.text) - match.end() < CHUNK_BYTES:
            at = match.start() if match else max(at, len(window.text) - CHUNK_BYTES)
            if window.grow(at):
                at = 0
                continue
            if match is None:
                return len(window.text)
            at = 0
            match = BETWEEN.search(window.text)
        decoded = window.decode(match.end())
        if decoded and isinstance(decoded[0], dict) and key in decoded[0]:
            return match.end()
        at = match.end()
