"""The interface of a format of data sets, which lets `prepare` read it on many processes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from alignvlm_jax import flag_types
from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UsageError


class Reject(Exception):
    """An error that rejects a single record; its message gives the reason in one line."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of a source that one worker reads and writes as a part.

    Attributes:
      path: the file.
      start: first byte, row group or page, whatever the format can seek to.
      stop: the first that is not part of the piece; -1 is the end of the file.
      name: what the ids of the piece's records begin with; "" for `filesystem.stem(path)`.
    """

    path: str
    start: int = 0
    stop: int = -1
    name: str = ""

    @property
    def prefix(self) -> str:
        """What the ids of the piece's records begin with, where the source gives them none."""
        return self.name or filesystem.stem(self.path)


class Raw(NamedTuple):
    """A record as the source has it, not yet decoded.

    Attributes:
      id: unique name of the record.
      document: name of the document, which decides the split: all records of a document are held
        out together.
      fields: plain values that can be pickled.
      place: where it lies in the file of its unit, as a row, a page or a member; a number is its
        first byte, of which `finish` tells the line.
      images: its image files, as the source names them.
    """

    id: str
    document: str
    fields: Mapping[str, Any]
    place: str | int = ""
    images: tuple[str, ...] = ()


class Rejection(NamedTuple):
    """A record that was left out, and why.

    Attributes:
      id: name of the record, or its place in the source if it could not be parsed.
      reason: one line.
      place: as in `Raw`.
      images: as in `Raw`.
    """

    id: str
    reason: str
    place: str | int = ""
    images: tuple[str, ...] = ()


class Defaults:
    """What formats inherit that read no files but those of units, and tell nothing of them."""

    def also_read(self, source: str) -> list[str]:
        """Returns no file; see `Format.also_read`."""
        return []

    def notes(self, source: str) -> Iterator[str]:
        """Yields no line; see `Format.notes`."""
        yield from ()


class Format(Protocol):
    """A format of data sets.

    Implementations are frozen dataclasses, which may inherit from `Defaults`; their fields (made
    by `option`) are the options of the format, which `prepare` takes as flags.

    Attributes:
      about: what it reads, in a line.
      schema: what its files look like, with an example of a record.
      suffixes: endings of its files, in lower case.
      first_key: the key that tells its objects from those of other formats with these endings; ""
        if it takes any.
    """

    about: ClassVar[str]
    schema: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    first_key: ClassVar[str]

    def units(self, source: str) -> list[Unit]:
        """Returns the units of a source, pieces of work, in a fixed order.

        Raises:
          UserError: the source is not there.
        """

    def also_read(self, source: str) -> list[str]:
        """Returns the files that records are made of beside those of the units, as those of OCR.

        Where one of them is another, or was written anew, `prepare` makes the data anew.
        """

    def notes(self, source: str) -> Iterator[str]:
        """Yields lines for the user that say what a source was taken for, and what told it."""

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the raw records of a unit, one at a time.

        What cannot even be parsed is a Rejection: no fault of the data may end the unit before its
        last readable record.
        """

    def record(self, raw: Raw) -> Record:
        """Returns the decoded record, which depends on `raw` and the files that it names alone.

        Raises:
          Reject: the record cannot be used.
        """


def names_of(text: str, flag: str) -> tuple[str, ...]:
    """Returns the names, joined by commas, of an option; raises UsageError for an empty one."""
    try:
        return tuple(flag_types.split(text))
    except ValueError as err:
        raise UsageError(f"{flag}: {err}") from err


def option(default: Any, help: str) -> Any:
    """Returns a dataclass field that is a flag of `prepare`, of the type of its default."""
    return dataclasses.field(default=default, metadata={"help": help})
