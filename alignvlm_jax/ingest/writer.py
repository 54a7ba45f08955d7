"""Parts: the intermediate files that `prepare` makes of one unit of a source.

A part is written by one process, and is either complete or absent.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignvlm_jax.data import index, tokenizers
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.shards import ShardWriter
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import exclude
from alignvlm_jax.ingest.formats import checks, files
from alignvlm_jax.ingest.formats.base import Format, Raw, Reject, Rejection, Unit
from alignvlm_jax.ingest.staging import Rejects

SPLITS = ("train", "validation")
REPORT_EVERY = 20  # records
UNANSWERED = "a question without an answer, in a record whose others stay"
MAX_NAMED = 5
MAX_NAME = 200
"""Images of a record that is dropped that are named, and characters of such a name."""
BESIDE = "writing-"
"""Prefix of the folders in which parts are written before they move into place."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A description of the data to prepare.

    Attributes:
      name: name of the format.
      format: the format, with its options.
      source: file, folder or gs:// URI to read.
      tokenizer: path of the tokenizer whose tokens are counted.
      holdout: fraction of documents that go to the validation split.
      split: if not empty, the split of all documents; it is for evaluation, not for training, and
        its questions need no answers.
      group_tokens: text tokens up to which the questions about an image share a record for
        training, where copies are dropped; 0 leaves each record as the source has it.
      shard_records: smallest number of records of a shard, but for the last one of a split.
      allow_outside: whether records may name images outside of the source and of the folder that
        their paths start from.
      exclude: prepared folders, as FOLDER or FOLDER:SPLIT, whose images no record may show.
    """

    name: str
    format: Format
    source: str
    tokenizer: str
    holdout: float
    split: str = ""
    group_tokens: int = 0
    shard_records: int = 1000
    allow_outside: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that the job may write."""
        return (self.split,) if self.split else SPLITS

    @property
    def grouped(self) -> str:
        """The split whose questions share records, the one for training."""
        return self.split or SPLITS[0]


class Line(NamedTuple):
    """What a part says of a record, for what is decided over all parts.

    Attributes:
      id: of the record.
      split: the one that it was written to.
      document: `document_hash` of its document.
      images: hashes of its images.
      group: hash of what records have to agree in to share their images; 0 if it shares none.
      content: hash of all but its id and the ids of its questions.
      words: hash of the words of its pages; 0 without any.
      tokens: those of its questions and answers.
      perceptual: `exclude.perceptual_hash` of its images, where the split is one for evaluation,
        which others may exclude.
      place: `Raw.place`.
      names: those of its images, as `named` gives them.
    """

    id: str
    split: str
    document: int
    images: list[int]
    group: int
    content: int
    words: int
    tokens: int
    perceptual: list[list[int]]
    place: str | int = ""
    names: Sequence[str] = ()


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
        """The path of a JSON lines file with a `Line` for each record, in the source's order."""
        return self.folder / f"{self.number:06d}.ids.jsonl"

    @property
    def rejected(self) -> Path:
        """The path of a JSON lines file of [counted as, [id, reason, place, images]] for records
        that were left out: the list of `Rejects`."""
        return self.folder / f"{self.number:06d}.rejected.jsonl"

    @property
    def images(self) -> Path:
        """The path of a JSON lines file of [path, `files.version`] for local images that records
        name; absent if there are none."""
        return self.folder / f"{self.number:06d}.images.jsonl"

    @property
    def counts(self) -> Path:
        """The path of a JSON file of the number of records that were left out, by reason.

        It is written last: if it exists, all files of the part do.
        """
        return self.folder / f"{self.number:06d}.counts.json"

    def is_done(self) -> bool:
        """Whether the part is complete."""
        return self.counts.exists()

    def remove(self) -> None:
        """Removes the part; first the file that says that it is complete."""
        self.counts.unlink(missing_ok=True)
        for path in self.folder.glob(f"{self.number:06d}[.-]*"):
            path.unlink()

    def lines(self) -> Iterator[Line]:
        """Yields what the part says of its records, in the source's order."""
        return (Line(*values) for values in read_lines(self.ids))


@dataclasses.dataclass(frozen=True)
class UnitWriter:
    """A picklable function that writes a part, in a worker process or under Apache Beam.

    Attributes:
      folder: path of the folder of all parts.
      request: what to write.
      excluded: the file of `exclude.gather`; "" where nothing is excluded.
    """

    folder: str
    request: Request
    excluded: str = ""

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
            for name in sorted(os.listdir(beside), key=lambda name: name == output.counts.name):
                os.replace(Path(beside, name), Path(self.folder, name))
            assert place.is_done()
        yield Progress(0, 1)

    def _write(self, output: UnitOutput, unit: Unit) -> Iterator[Progress]:
        """Writes all files of a part to the folder of `output`."""
        files.ROOTS.set(None if self.request.allow_outside else (self.request.source,))
        seen: dict[str, str] = {}
        files.SEEN.set(seen)
        lines = []
        rejects = Rejects()
        splits = {}
        count = 0
        with contextlib.ExitStack() as stack:
            for item in self.request.format.raws(unit):
                try:
                    record, split, place, num_lost = self._record(item)
                    # Opened with the first record: a split without any leaves no empty shard.
                    if split not in splits:
                        shard = stack.enter_context(ShardWriter(output.shard(split)))
                        splits[split] = shard, index.Builder(*_tokenizer(self.request.tokenizer))
                    shard, builder = splits[split]
                    # Before the shard is written: a record that the index cannot count must not
                    # be in it.
                    with _no_fault_ends_all():
                        num_tokens = builder.add(record)
                except Reject as err:
                    rejects.add(str(err), (item.id, str(err), item.place, named(item)))
                else:
                    shard.write(record)
                    line = _line(
                        record, split, place, num_tokens["answer"], bool(self.request.split)
                    )
                    lines.append(line._replace(place=item.place, names=named(item)))
                    # Told, though the record stays: else nobody would miss them.
                    for _ in range(num_lost):
                        lost = (record.id, UNANSWERED, item.place, named(item))
                        rejects.add(UNANSWERED, lost)
                count += 1
                if count % REPORT_EVERY == 0:
                    yield Progress(REPORT_EVERY)
        for split, (_, builder) in splits.items():
            index.write(index.index_path(output.shard(split)), builder.build())
        write_lines(output.ids, lines)
        write_lines(output.rejected, rejects.listed)
        # The unit's own file is in the listing of the source.
        if others := [one for one in seen.items() if one[0] != unit.path]:
            write_lines(output.images, others)
        output.counts.write_text(json.dumps(dict(rejects.counts)))
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
            made = self.request.format.record(item)
            record = checks.check(made, needs_answers=not self.request.split)
            if self.excluded and (
                reason := exclude.opened(self.excluded).reason_against(record.id, record.images)
            ):
                raise Reject(reason)
            place = document_hash(item.document)
            split = self.request.split or SPLITS[place < self.request.holdout * 2**64]
            return record, split, place, len(made.turns) - len(record.turns)


def _line(record: Record, split: str, document: int, num_tokens: int, is_kept: bool) -> Line:
    """Returns what a part says of a record; with `is_kept` also the perceptual hashes."""
    images = [exclude.hash_of(image) for image in record.images]
    turns = [(turn.question, turn.answers, turn.image_offsets) for turn in record.turns]
    words = exclude.hash_of(repr(record.lines).encode()) if record.lines else 0
    # A turn of a conversation stands behind those before it, and an image within a question stands
    # where it is: such records share none.
    is_shared = bool(images) and not record.has_order
    group = (
        exclude.hash_of(repr([record.source, record.system, images]).encode()) if is_shared else 0
    )
    # The ids of questions are no part of it: sets number anew what they copy.
    content = (images, turns, words, record.is_conversation, record.system)
    return Line(
        record.id,
        split,
        document,
        images,
        group,
        exclude.hash_of(repr(content).encode()),
        words,
        num_tokens,
        [exclude.perceptual_hash(image, f"of {record.id}") for image in record.images]
        if is_kept
        else [],
    )


def named(item: Raw | Rejection) -> list[str]:
    """Returns the names of a record's images for a list that stays short whatever the source
    holds."""
    return [name[:MAX_NAME] for name in item.images[:MAX_NAMED]]


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
    return exclude.hash_of(document.encode(errors="surrogatepass"))


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
