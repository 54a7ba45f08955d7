"""The `jsonl` format: your own data, with a JSON object on each line.

    {"images": ["scans/1.png"], "turns": [{"question": "What is the total?", "answers": ["12.50",
    "12,50"]}]}

`images` are paths from the file's folder (or from --images), gs:// URIs, data URIs, or base64 of
more than 4,096 characters. The first of the `answers` is taught, the others count as right too. May
be left out: `id` (else the file and the byte where its line begins); `document` (else the first
image's path; documents, not records, are held out); `turns`, where there are `lines`, for each
image its lines of words in reading order:

    "lines": [[[{"text": "Total", "box": [left, top, right, bottom]}, ...], ...]]        pixels of
    the upright image
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.ingest.formats import checks, files
from alignvlm_jax.ingest.formats.base import Raw, Reject, Rejection, Unit, option


@dataclasses.dataclass(frozen=True)
class Jsonl:
    """A JSON lines file, or a folder of them."""

    images: str = option("", "folder that image paths start from; default: that of the file")

    def units(self, source: str) -> list[Unit]:
        """Returns byte ranges of all files; see `Format.units`."""
        return [
            unit
            for path in filesystem.list_files(source, files.SUFFIXES)
            for unit in files.line_units(path)
        ]

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the objects of a byte range; see `Format.raws`."""
        folder = self.images or filesystem.parent(unit.path)
        for item in files.json_objects(unit):
            yield item if isinstance(item, Rejection) else _raw(*item, folder)

    def record(self, raw: Raw) -> Record:
        """Returns the record of an object, with its image files; see `Format.record`."""
        fields = raw.fields
        images = _list(fields.get("images"), "images", str)
        return Record(
            raw.id,
            "jsonl",
            files.images(fields["folder"], images),
            tuple(_turn(turn) for turn in _list(fields.get("turns"), "turns", dict)),
            _pages(fields["lines"]) if fields.get("lines") else (),
        )


def _raw(where: str, fields: dict[str, Any], folder: str) -> Raw | Rejection:
    """Returns an object with its id and document; they fall back on `where` and the first image."""
    try:
        name = where if fields.get("id") is None else checks.text_of(fields["id"], "id")
        images = fields.get("images")
        # Whether `images` is a list of texts is checked in `record`: here it only names a document.
        first = images[0] if isinstance(images, list) and images else name
        document = checks.text_of(
            first if fields.get("document") is None else fields["document"], "document"
        )
    except Reject as err:
        return Rejection(where, str(err))
    return Raw(name, document, fields | {"folder": folder})


def _list(value: Any, name: str, kind: type) -> list:
    """Returns a list of values of `kind`, empty for null; raises Reject for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise Reject(f"{name} is no list of {'texts' if kind is str else 'objects'}")
    return value


def _turn(fields: dict[str, Any]) -> Turn:
    """Returns a turn of a record; raises Reject if it has no question."""
    return Turn(
        checks.text_of(fields.get("question"), "question"), checks.answers_of(fields.get("answers"))
    )


def _pages(pages: Any) -> tuple:
    """Returns the words of all pages as nested tuples: pages, lines, words."""
    try:
        # `**word` also refuses keys that are unknown or missing, with a TypeError.
        return tuple(
            tuple(tuple(_word(**word) for word in line) for line in page) for page in pages
        )
    except (TypeError, ValueError) as err:
        raise Reject(f"lines are not lists of lists of words with text and box ({err})") from err


def _word(text: str, box: list[float]) -> Word:
    """Returns a word; raises TypeError or ValueError if its text or its box is unusable."""
    left, top, right, bottom = map(float, box)
    if not isinstance(text, str):
        raise TypeError("text is no text")
    # Python's JSON reads NaN and Infinity, which pass every comparison below.
    if not all(map(math.isfinite, (left, top, right, bottom))) or left > right or top > bottom:
        raise ValueError(f"no box: {box}")
    return Word(text, (left, top, right, bottom))
