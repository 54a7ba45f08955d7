"""What a format of data sets has to do, so that `prepare` can read it on any number of
processes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from alignvlm_jax.data.record import Record


class Reject(Exception):
    """This record cannot be used, for the reason that the message gives in one line; the others go
    on."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of a source that is read on its own and becomes a shard of its own: `start` to `stop`
    count what the format can seek to (bytes, row groups, pages); -1 is the file's end."""

    path: str
    start: int = 0
    stop: int = -1


class Raw(NamedTuple):
    """A record as the source has it. `fields` are plain values that can be pickled.

    `document` decides the split: all records of a document are held out together.
    """

    id: str
    document: str
    fields: Mapping[str, Any]


class Rejection(NamedTuple):
    """Why a record was left out.

    `id` is where it lies in the source, where it could not be parsed.
    """

    id: str
    reason: str


class Format(Protocol):
    """A frozen dataclass; its fields are the format's options (`option`), which `prepare` takes as
    flags."""

    def units(self, source: str) -> list[Unit]:
        """Returns the pieces of a source in a fixed order; UserError for a source that is not
        there."""

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Reads a piece, one record at a time. What cannot even be parsed is a Rejection: no fault
        of the data may end the piece before its last record that can be read."""

    def record(self, raw: Raw) -> Record:
        """Returns the record; depends on `raw` and the files that it names alone. Raises Reject."""


def option(default: Any, help: str) -> Any:
    """Returns a dataclass field of a format: the flag of its name, of its default's type."""
    return dataclasses.field(default=default, metadata={"help": help})
