"""What is decided over the records of all parts: which are dropped, and which share their images.

The parts' lines are held as arrays, about 60 bytes a record, so that a source may have tens of
millions of records.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.ingest.writer import SPLITS, Line, UnitOutput, document_hash

STAYS, REPEATED, COPIED, HELD_OUT, JOINED = range(5)
"""What becomes of a record: it stays, is dropped for one of three reasons, or goes into another."""
COLUMNS = np.dtype(
    [
        ("id", np.uint64),
        ("split", np.uint8),
        ("document", np.uint64),
        ("num_images", np.int32),
        ("group", np.uint64),
        ("content", np.uint64),
        ("words", np.uint64),
        ("tokens", np.int32),
    ]
)
"""A `writer.Line` as numbers: of the id a hash, of the split its place among those of the job."""


class Move(NamedTuple):
    """A document that goes to another split than the one it was written to, which has no other.

    Attributes:
      document: its `writer.document_hash`.
      source: the split of the parts' shards that it is in.
      target: the split that it goes to.
    """

    document: int
    source: str
    target: str


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The N lines of all parts, one part after another, and what becomes of each record.

    Attributes:
      splits: names of the splits of the job.
      starts: int64 [parts + 1]; part p has the lines `starts[p]` to `starts[p + 1]`.
      lines: [N] of `COLUMNS`, as they were written.
      images: uint64 [M], hashes of the images, line after line.
      splits_of: uint8 [N], the split that each record goes to.
      fates: uint8 [N], one of `STAYS` and the names beside it.
      others: int64 [N], the line of the record that a repeated or copied one equals, or that one
        has joined; its own elsewhere.
    """

    splits: tuple[str, ...]
    starts: np.ndarray
    lines: np.ndarray
    images: np.ndarray
    splits_of: np.ndarray
    fates: np.ndarray
    others: np.ndarray

    @property
    def image_starts(self) -> np.ndarray:
        """int64 [N + 1]: line n has the images `image_starts[n]` to `image_starts[n + 1]`."""
        return np.append(0, np.cumsum(self.lines["num_images"], dtype=np.int64))

    def part(self, number: int) -> slice:
        """Returns the lines of a part."""
        return slice(*self.starts[number : number + 2].tolist())

    def part_of(self, line: int) -> int:
        """Returns the number of the part that has a line."""
        # The last part that starts at the line or before it; "right" passes over empty parts.
        return int(np.searchsorted(self.starts, line, side="right")) - 1

    def stay(self, split: str) -> np.ndarray:
        """Returns whether each record stays, and goes to a split, bool [N]."""
        return (self.fates == STAYS) & (self.splits_of == self.splits.index(split))

    def drop(self, lines: np.ndarray, fate: int, others: np.ndarray | None = None) -> None:
        """Says what becomes of the records of these lines, and of which others that is."""
        self.fates[lines] = fate
        if others is not None:
            self.others[lines] = others


def read(outputs: Sequence[UnitOutput], splits: tuple[str, ...]) -> Table:
    """Returns the lines of all parts; all of their records stay."""
    parts = [np.zeros(0, COLUMNS)]
    images = [np.zeros(0, np.uint64)]
    for output in outputs:
        rows = []
        hashes: list[int] = []
        for line in output.lines():
            rows.append(_numbers(line, splits))
            hashes += line.images
        parts.append(np.array(rows, COLUMNS))
        images.append(np.array(hashes, np.uint64))
    lines = np.concatenate(parts)
    return Table(
        splits,
        # Without the empty array in front, which np.concatenate needs where there are no parts.
        np.cumsum([len(part) for part in parts], dtype=np.int64),
        lines,
        np.concatenate(images),
        lines["split"].copy(),
        np.full(len(lines), STAYS, np.uint8),
        np.arange(len(lines), dtype=np.int64),
    )


def _numbers(line: Line, splits: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the values of `COLUMNS` for a line."""
    return (
        document_hash(line.id),
        splits.index(line.split),
        line.document,
        len(line.images),
        line.group,
        line.content,
        line.words,
        line.tokens,
    )


def drop_repeated_ids(table: Table, outputs: Sequence[UnitOutput]) -> None:
    """Drops the records whose id came before, in the order of the source."""
    hashes = table.lines["id"]
    values, counts = np.unique(hashes, return_counts=True)
    suspects = np.flatnonzero(np.isin(hashes, values[counts > 1]))
    first: dict[str, int] = {}
    for line, values in zip(suspects.tolist(), read_again(table, outputs, suspects), strict=True):
        # Equal hashes are no proof: the ids themselves decide, so that a collision drops no good
        # record.
        if first.setdefault(values.id, line) != line:
            table.drop(np.array([line]), REPEATED, np.array([first[values.id]]))


def read_again(table: Table, outputs: Sequence[UnitOutput], lines: np.ndarray) -> Iterator[Line]:
    """Yields what the parts say of the records of some lines, int64 [n] in ascending order."""
    for number in np.unique(np.searchsorted(table.starts, lines, side="right") - 1).tolist():
        begin, end = table.starts[number : number + 2].tolist()
        wanted = set((lines[np.searchsorted(lines, begin) : np.searchsorted(lines, end)]).tolist())
        # Ids are texts of any length, and are read again rather than kept.
        for line, values in enumerate(outputs[number].lines(), begin):
            if line in wanted:
                yield values


def move_of(table: Table, holdout: float) -> Move | None:
    """Returns the document that has to change its split, so that neither split is empty.

    It is the one that the next larger, or smaller, `holdout` would move, whatever the order of the
    parts. None where both splits have records, where `holdout` empties one on purpose, or where
    there are not two documents.
    """
    stays = table.fates == STAYS
    found = np.unique(table.lines["split"][stays]).tolist()
    if len(found) != 1 or not 0 < holdout < 1:
        return None
    documents = table.lines["document"][stays]
    lowest = int(documents.min())
    highest = int(documents.max())
    if lowest == highest:
        return None
    source = table.splits[found[0]]
    [target] = set(SPLITS) - {source}
    return Move(lowest if target == "validation" else highest, source, target)


def apply(table: Table, move: Move) -> None:
    """Gives the records of a moved document to their new split."""
    table.splits_of[table.lines["document"] == np.uint64(move.document)] = table.splits.index(
        move.target
    )


def num_documents(table: Table) -> dict[str, int]:
    """Returns of how many documents the records of each split are, but for those dropped."""
    is_kept = (table.fates == STAYS) | (table.fates == JOINED)
    return {
        split: len(np.unique(table.lines["document"][is_kept & (table.splits_of == number)]))
        for number, split in enumerate(table.splits)
    }


def drop_held_out(table: Table) -> None:
    """Drops the records for training all of whose images are, byte for byte, some of validation:
    copies of a file, or documents that share it. One image among others, as a blank page, drops
    none."""
    of_line = np.repeat(np.arange(len(table.lines)), table.lines["num_images"])
    # Of documents, not of records: a copy of a page may come before the page that is held out.
    held = np.unique(table.images[table.stay("validation")[of_line]])
    # Of each record, how many of its images are held out.
    counts = np.bincount(of_line[np.isin(table.images, held)], minlength=len(table.lines))
    shows = (counts > 0) & (counts == table.lines["num_images"])
    table.drop(np.flatnonzero(table.stay("train") & shows), HELD_OUT)


def drop_copies(table: Table) -> None:
    """Drops records that equal another one of their split in all but names; the first stays."""
    stays = np.flatnonzero(table.fates == STAYS)
    keys = [table.lines["content"][stays], table.splits_of[stays]]
    # lexsort is stable: of equal records the first of the source comes first.
    order = np.lexsort(keys)
    is_copy = np.zeros(len(stays), bool)
    is_copy[1:] = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    # The place of the last one that is no copy, carried on over those that follow it.
    firsts = np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(stays))))
    lines = stays[order]
    table.drop(lines[is_copy], COPIED, lines[firsts[is_copy]])


def join(table: Table, split: str, max_tokens: int) -> None:
    """Lets the questions of a split that are about equal images share the first one's record.

    A record takes on those that follow it in the source as long as their tokens are at most
    `max_tokens` together, and their words, where they have any, are the same; the next one that it
    cannot take begins another record.
    """
    lines = np.flatnonzero(table.stay(split) & (table.lines["group"] != 0))
    # Stable: those of a group keep the order of the source.
    lines = lines[np.argsort(table.lines["group"][lines], kind="stable")]
    groups = table.lines["group"][lines]
    begins = np.flatnonzero(np.append(True, groups[1:] != groups[:-1])[: len(lines)])
    ends = np.append(begins[1:], len(lines))
    firsts = table.images[table.image_starts[:-1][lines]]
    # Most groups of a crawl are single pages, which cost no turn of the loop.
    several = np.flatnonzero(ends - begins > 1)
    for begin, end in zip(begins[several].tolist(), ends[several].tolist(), strict=True):
        # The hash of an image beside that of its group: a collision of one joins no two pages.
        if (firsts[begin:end] == firsts[begin]).all():
            _join(table, lines[begin:end], max_tokens)


def _join(table: Table, lines: np.ndarray, max_tokens: int) -> None:
    """Joins the records of lines, int64 [n], that agree in their images."""
    first = -1
    tokens = words = 0
    columns = (table.lines[name][lines].tolist() for name in ("tokens", "words"))
    for line, num_tokens, its_words in zip(lines.tolist(), *columns, strict=True):
        is_same_page = not (words and its_words) or words == its_words
        # A first record may be longer than the cap: it stays, and nothing joins it.
        if first < 0 or tokens + num_tokens > max_tokens or not is_same_page:
            first = line
            tokens = words = 0
        else:
            table.fates[line] = JOINED
            table.others[line] = first
        tokens = tokens + num_tokens
        words = words or its_words


def joined(records: Sequence[Record]) -> Record:
    """Returns one record of several about the same images, named as the first.

    The words of a page are kept once. Each question keeps its own id: that of its record, where the
    source gave it none.
    """
    turns = itertools.chain.from_iterable(map(_turns, records))
    lines = next((record.lines for record in records if record.lines), ())
    return dataclasses.replace(records[0], turns=tuple(turns), lines=lines)


def _turns(record: Record) -> Iterator[Turn]:
    """Yields the turns of a record, each with an id."""
    for number, turn in enumerate(record.turns):
        name = record.id if len(record.turns) == 1 else f"{record.id}-{number}"
        # Of several turns none may place the images: they stand before the first.
        yield dataclasses.replace(turn, id=turn.id or name, image_offsets=())
