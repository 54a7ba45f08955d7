"""Reader of files that are one JSON array of objects, of any size.

A window moves over the file, and only what it covers is in memory.
"""

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
# Between elements of the array; the bracket is the one that opens the array.
SEPARATORS = re.compile(r"[\s,\[]*")
# The end of one object and the start of the next: where reading resumes after a broken element.
BETWEEN = re.compile(r"\}\s*,\s*(?=\{)")


class _Window:
    """A stretch of a file, decoded as Latin-1.

    Each character then is one byte, so that offsets into `text` are offsets into the file, and no
    byte of a UTF-8 sequence looks like JSON's punctuation, which is ASCII.

    Attributes:
      start: byte of the file where the window begins.
      text: the content of the window.
    """

    def __init__(self, file: io.BufferedReader, start: int):
        self._file = file
        self.start = start
        self.text = ""

    def grow(self, at: int) -> bool:
        """Drops the text before `at` and reads on; returns False at the end of the file.

        The character at `at` has index 0 afterwards.
        """
        self.text = self.text[at:]
        self.start = self.start + at
        # The window doubles: an element that does not fit is parsed from its start each time, which
        # would take quadratic time with chunks of one size.
        more = self._file.read(max(CHUNK_BYTES, len(self.text)))
        self.text += more.decode("latin-1")
        return bool(more)

    def decode(self, at: int) -> tuple[Any, int] | None:
        """Returns the JSON value that begins at `at` and the index where it ends.

        Returns None if the value is broken or reaches beyond the window.
        """
        try:
            return json.JSONDecoder().raw_decode(self.text, at)
        except (ValueError, RecursionError):
            return None


def units(path: str, key: str, name: str = "") -> list[Unit]:
    """Returns byte ranges of a file that hold `files.UNIT_RECORDS` elements each, in order.

    Ranges of a large file hold more, so that there are at most about `files.MAX_UNITS`. All but
    the first begin at the first byte of an element, or of a broken stretch.

    Args:
      path: the file.
      key: a key that every element has, as in `objects`.
      name: of the units.
    """
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
        Unit(path, start, stop, name)
        for start, stop in zip(starts, [*starts[1:], size], strict=True)
    ]


def objects(unit: Unit, key: str) -> Iterator[files.Parsed | Rejection]:
    """Yields the objects of a byte range.

    A broken stretch becomes one Rejection, and reading resumes at the next object that has `key`.
    """
    name = unit.prefix
    for start, element in _elements(unit.path, unit.start, unit.stop, key):
        where = f"{name}-{start}"
        if element is None:
            yield Rejection(where, "no JSON from here to the next record", start)
            continue
        item = files.parse_json(where, element)
        if isinstance(item, Rejection):
            yield item._replace(place=start)
        else:
            yield files.Parsed(*item, start)


def _elements(path: str, start: int, stop: int, key: str) -> Iterator[tuple[int, bytes | None]]:
    """Yields the elements that begin in bytes `start` to `stop`, as (first byte, content).

    The content of a broken stretch is None.
    """
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
            # An element belongs to the range that its first byte is in, and is read to its end even
            # beyond `stop`. Nested brackets are within elements: a bare one closes the array.
            begin = window.start + at
            if begin >= stop or window.text[at] == "]":
                return
            decoded = window.decode(at)
            if decoded:
                yield begin, window.text[at : decoded[1]].encode("latin-1")
                at = decoded[1]
            elif len(window.text) - at < MAX_ELEMENT_BYTES and window.grow(at):
                # It may be an element that is not all in the window: try again with more.
                at = 0
            else:
                yield begin, None
                # The failed `grow` above may have moved the window to `begin`.
                at = _next_object(window, at if window.start + at == begin else 0, key)


def _next_object(window: _Window, at: int, key: str) -> int:
    """Returns the index in the window of the next object with `key`, or of the file's end.

    `key` tells elements of the array from objects nested within a broken one.
    """
    while True:
        match = BETWEEN.search(window.text, at)
        # Less than a chunk behind the match: the object may not be all there, and would be taken
        # for a broken one. Without a match a chunk is kept, in which one may begin.
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
