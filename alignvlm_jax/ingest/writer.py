"""Parts: the intermediate files that `prepare` makes of one unit of a source.

A part is written by one process, and is either complete or absent.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alignvlm_jax.data import index, tokenizers
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.shards import ShardWriter
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import checks
from alignvlm_jax.ingest.formats.base import Format, Raw, Reject, Rejection, Unit

SPLITS = ("train", "validation")
REPORT_EVERY = 20  # records
UNANSWERED = "a question without an answer, in a record whose others stay"
BESIDE = "writing-"
"""Prefix of the folders in which parts are written before they move into place."""


class Progress(NamedTuple):
    """The records that a worker has read, and the parts it has finished, since its last report."""

    records: int
    outputs: int = 0


@dataclasses.dataclass(frozen=True)
class UnitOutput:
    """The paths of the files of a part, by its number."""

    folder: Path
    number: int

    def shard(self, split: str) -> Path:
        """Returns the path of the part's records of a split; absent if there are none.

        The index lies beside it (`index.index_path`).
        """
        return self.folder / f"{self.number:06d}-{split}.array_record"

    @property
    def ids(self) -> Path:
        """The path of a JSON lines file with a line for each record, in the source's order.

        A line is [id, split, `document_hash` of its document, hashes of its images].
        """
        return self.folder / f"{self.number:06d}.ids.jsonl"

    @property
    def rejected(self) -> Path:
        """The path of a JSON lines file of [id, reason] for each record that was left out.

        It is written last: if it exists, all files of the part do.
        """
        return self.folder / f"{self.number:06d}.rejected.jsonl"

    def is_done(self) -> bool:
        """Whether the part is complete."""
        return self.rejected.exists()


@dataclasses.dataclass(frozen=True)
class UnitWriter:
    """A picklable function that writes a part, in a worker process or under Apache Beam.

    Attributes:
      folder: path of the folder of all parts.
      format: format of the source.
      tokenizer: path of the tokenizer that counts the tokens for the index.
      holdout: fraction of the documents that go to the validation split.
      split: if not empty, the split of all documents; their questions need no answers then.
    """

    folder: str
    format: Format
    tokenizer: str
    holdout: float
    split: str = ""

    def __call__(self, task: tuple[int, Unit]) -> Iterator[Progress]:
        """Writes the part of a unit, and yields the progress.

        Args:
          task: the number of the part, and the unit.

        Raises:
          UserError: the part cannot be written, or a bucket does not answer.
        """
        number, unit = task
        # In a folder of its own: where a scheduler tries twice, another process may be at the same
        # part.
        with tempfile.TemporaryDirectory(prefix=BESIDE, dir=self.folder) as beside:
            output = UnitOutput(Path(beside), number)
            place = UnitOutput(Path(self.folder), number)
            yield from self._write(output, unit)
            # False sorts before True: the file that says that all are there moves last.
            for name in sorted(os.listdir(beside), key=lambda name: name == output.rejected.name):
                os.replace(Path(beside, name), Path(self.folder, name))
            assert place.is_done()
        yield Progress(0, 1)

    def _write(self, output: UnitOutput, unit: Unit) -> Iterator[Progress]:
        """Writes all files of a part to the folder of `output`."""
        ids = []
        rejected = []
        splits = {}
        count = 0
        with contextlib.ExitStack() as stack:
            for item in self.format.raws(unit):
                try:
                    record, split, place, num_lost = self._record(item)
                    # Opened with the first record: a split without any leaves no empty shard.
                    if split not in splits:
                        shard = stack.enter_context(ShardWriter(output.shard(split)))
                        splits[split] = shard, index.Builder(*_tokenizer(self.tokenizer))
                    shard, builder = splits[split]
                    # Before the shard is written: a record that the index cannot count must not
                    # be in it.
                    with _no_fault_ends_all():
                        builder.add(record)
                except Reject as err:
                    rejected.append((item.id, str(err)))
                else:
                    shard.write(record)
                    ids.append((record.id, split, place, [hash_of(one) for one in record.images]))
                    # Told, though the record stays: else nobody would miss them.
                    rejected += [(record.id, UNANSWERED)] * num_lost
                count += 1
                if count % REPORT_EVERY == 0:
                    yield Progress(REPORT_EVERY)
        for split, (_, builder) in splits.items():
            index.write(index.index_path(output.shard(split)), builder.build())
        write_lines(output.ids, ids)
        write_lines(output.rejected, rejected)
        yield Progress(count % REPORT_EVERY)

    def _record(self, item: Raw | Rejection) -> tuple[Record, str, int, int]:
        """Returns the checked record, its split, the hash of its document, and how many questions
        without an answer it has lost.

        Raises:
          Reject: it cannot be used.
        """
        if isinstance(item, Rejection):
            raise Reject(item.reason)
        with _no_fault_ends_all():
            made = self.format.record(item)
            record = checks.check(made, needs_answers=not self.split)
            place = document_hash(item.document)
            split = self.split or SPLITS[place < self.holdout * 2**64]
            return record, split, place, len(made.turns) - len(record.turns)


@contextlib.contextmanager
def _no_fault_ends_all() -> Iterator[None]:
    """Turns an unforeseen exception into a Reject of the record at hand.

    A bug that one record in a million meets must not end the run; the summary shows its reason.
    """
    try:
        yield
    except (Reject, UserError):
        raise
    except Exception as err:
        raise Reject(
            f"unforeseen {type(err).__name__} ({' '.join(str(err).split())[:200]})"
        ) from err


def document_hash(document: str) -> int:
    """Returns a number from 0 to 2**64, which decides the split of a document.

    Those below `holdout` * 2**64 are for validation: all records of a document share a split,
    whatever unit they lie in, and a larger `holdout` only adds documents to validation.
    """
    # JSON may spell half a surrogate pair, which UTF-8 refuses.
    return hash_of(document.encode(errors="surrogatepass"))


def hash_of(content: bytes) -> int:
    """Returns 64 bits of BLAKE2b: unlike `hash`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes values as JSON lines, one value a line."""
    with open(path, "w") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def read_lines(path: Path) -> Iterator[Any]:
    """Yields the values of a JSON lines file."""
    with open(path) as file:
        yield from map(json.loads, file)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> tuple[tokenizers.Tokenizer, str]:
    """Returns a tokenizer and its fingerprint, loaded once in each worker process."""
    return tokenizers.load(path), index.tokenizer_fingerprint(path)
