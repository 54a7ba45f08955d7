"""Parts: what becomes of one unit of a source.

Each is written by one process, and is whole or not there.
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
BESIDE = "writing-"
"""How folders of parts in work are called."""


class Progress(NamedTuple):
    """What a worker did since it last said so."""

    records: int
    outputs: int = 0


@dataclasses.dataclass(frozen=True)
class UnitOutput:
    """The files of a part."""

    folder: Path
    number: int

    def shard(self, split: str) -> Path:
        """Records of a split, with their index beside; neither is there where it has none."""
        return self.folder / f"{self.number:06d}-{split}.array_record"

    @property
    def ids(self) -> Path:
        """JSON lines, of the records in the order of the source: [id, split]."""
        return self.folder / f"{self.number:06d}.ids.jsonl"

    @property
    def rejected(self) -> Path:
        """JSON lines, of the records that were left out: [id, reason].

        It comes last: where it is, all files are.
        """
        return self.folder / f"{self.number:06d}.rejected.jsonl"

    def is_done(self) -> bool:
        """Whether the part has been written."""
        return self.rejected.exists()


@dataclasses.dataclass(frozen=True)
class UnitWriter:
    """Writes parts, in worker processes or under Apache Beam.

    Attributes:
      folder: where parts lie.
      format: of the source.
      tokenizer: path of the one that counts.
      holdout: fraction of the documents that go to the validation split.
      split: where all documents go instead, if it has a name; their questions need no answers then.
    """

    folder: str
    format: Format
    tokenizer: str
    holdout: float
    split: str = ""

    def __call__(self, task: tuple[int, Unit]) -> Iterator[Progress]:
        """Writes part `task[0]` out of a unit; UserError where it cannot be written or a bucket
        does not answer."""
        number, unit = task
        # In a folder of its own: where a scheduler tries twice, another process may be at the same
        # part.
        with tempfile.TemporaryDirectory(prefix=BESIDE, dir=self.folder) as beside:
            output = UnitOutput(Path(beside), number)
            place = UnitOutput(Path(self.folder), number)
            yield from self._write(output, unit)
            for name in sorted(os.listdir(beside), key=lambda name: name == output.rejected.name):
                os.replace(Path(beside, name), Path(self.folder, name))
            assert place.is_done()
        yield Progress(0, 1)

    def _write(self, output: UnitOutput, unit: Unit) -> Iterator[Progress]:
        ids = []
        rejected = []
        splits = {}
        count = 0
        with contextlib.ExitStack() as stack:
            for item in self.format.raws(unit):
                try:
                    record, split = self._record(item)
                    if split not in splits:
                        shard = stack.enter_context(ShardWriter(output.shard(split)))
                        splits[split] = shard, index.Builder(*_tokenizer(self.tokenizer))
                    shard, builder = splits[split]
                    with _no_fault_ends_all():
                        builder.add(record)
                except Reject as err:
                    rejected.append((item.id, str(err)))
                else:
                    shard.write(record)
                    ids.append((record.id, split))
                count += 1
                if count % REPORT_EVERY == 0:
                    yield Progress(REPORT_EVERY)
        for split, (_, builder) in splits.items():
            index.write(index.index_path(output.shard(split)), builder.build())
        write_lines(output.ids, ids)
        write_lines(output.rejected, rejected)
        yield Progress(count % REPORT_EVERY)

    def _record(self, item: Raw | Rejection) -> tuple[Record, str]:
        """The record and its split; Reject where it cannot be used."""
        if isinstance(item, Rejection):
            raise Reject(item.reason)
        with _no_fault_ends_all():
            record = checks.check(self.format.record(item), needs_answers=not self.split)
            return record, self.split or split_of(item.document, self.holdout)


@contextlib.contextmanager
def _no_fault_ends_all() -> Iterator[None]:
    """One of ours, in a run over millions of records, rejects the record; the summary shows it."""
    try:
        yield
    except (Reject, UserError):
        raise
    except Exception as err:
        raise Reject(
            f"unforeseen {type(err).__name__} ({' '.join(str(err).split())[:200]})"
        ) from err


def split_of(document: str, holdout: float) -> str:
    """Returns the split of a document: a pure function, so that all its records go together,
    wherever they lie."""
    digest = hashlib.blake2b(document.encode(errors="surrogatepass"), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "big") < holdout * 2**64]


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes values as JSON lines."""
    with open(path, "w") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)


def read_lines(path: Path) -> Iterator[Any]:
    """Reads JSON lines."""
    with open(path) as file:
        yield from map(json.loads, file)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> tuple[tokenizers.Tokenizer, str]:
    return tokenizers.load(path), index.tokenizer_fingerprint(path)
