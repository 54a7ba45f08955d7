"""The `parquet` format: question-answer sets as the Hugging Face hub has them.

Images are bytes, structs with `bytes` and `path`, or lists of these. The names of columns come from
flags, or else from the first entry of `KNOWN` whose columns are all there.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
from pyarrow import parquet

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.ingest.formats import checks, files
from alignvlm_jax.ingest.formats.base import Raw, Reject, Rejection, Unit, option

UNIT_ROWS = 1000
BATCH_ROWS = 16
"""Number of rows in memory at a time, each with its images."""

MAX_UNPACKED = 768 << 20
MAX_RATIO = 20
"""Largest ratio of unpacked to packed size of a row group that is larger than `MAX_UNPACKED`.

Image files do not compress: a row group above both limits holds something else, and pyarrow would
unpack it in one piece, which takes twice its size.
"""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of the columns of a data set; "" for a column that it does not have.

    `id` is given only where ids are unique; else rows are numbered.
    """

    image: str
    question: str
    answer: str
    id: str = ""
    document: str = ""

    def names(self) -> list[str]:
        """Returns the names that are not empty."""
        return [name for name in dataclasses.astuple(self) if name]


KNOWN = {
    "DocVQA": Columns("image", "question", "answers", "questionId", "docId"),
    "InfographicVQA": Columns("image", "question", "answers", "questionId", "image_url"),
    "TextVQA": Columns("image", "question", "answers", "question_id", "image_id"),
    "ChartQA": Columns("image", "query", "label"),
    "ChartQA of lmms-eval": Columns("image", "question", "answer"),
    "BigDocs": Columns("images", "queries", "annotations", "identifier"),
    "BigDocs-Bench": Columns("images", "queries", "annotations", "sample_id"),
}

# What pyarrow raises for files that are not parquet, or damaged.
BROKEN = (pa.ArrowException, OSError, ValueError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Parquet:
    """The format of a parquet file, or of a folder of them."""

    about: ClassVar[str] = (
        "question-answer sets with their images, as the Hugging Face hub has them"
    )
    schema: ClassVar[str] = """\
A parquet file, or a folder of them. A row is a record, its columns named by flags:

    image       bytes, a struct of bytes and path, or a list of these
    question    text, or a list of texts
    answer      text, a list of answers that are all right, or a list with one for each question

Without flags, the columns of a known set are taken: image, question, answers (DocVQA,
InfographicVQA, TextVQA); image, query, label (ChartQA); image, question, answer; images, queries,
annotations (BigDocs). A row of such a set:

    image: {"bytes": ..., "path": "1.png"}, question: "What is the total?", answers: ["12.50"]"""
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    first_key: ClassVar[str] = ""

    image_column: str = option("", "column of the image or images")
    question_column: str = option(
        "", "column of the question, or of a list of questions with an answer each"
    )
    answer_column: str = option("", "column of the answer or answers")
    id_column: str = option("", "column of ids that are unique; default: rows are numbered")
    document_column: str = option(
        "", "column of the document, which is held out whole; default: equal images are one"
    )

    def units(self, source: str) -> list[Unit]:
        """Returns runs of row groups of all files; see `Format.units`.

        Raises:
          UserError: the source is not there, or no readable file has the columns.
        """
        found = []
        usable = 0
        wrong = None
        names = files.named(source, filesystem.list_files(source, self.suffixes))
        for path, name in names.items():
            try:
                with filesystem.open_file(path) as file:
                    reader = parquet.ParquetFile(file)
                    self._columns(reader.schema_arrow.names, path)
                    found += _units(path, name, reader.metadata)
                    usable += 1
            except (UserError, *BROKEN) as err:
                # A bucket that does not answer is no fault of the file.
                filesystem.raise_if_passing(path, err)
                # `raws` opens it again, and rejects it with the reason.
                found.append(Unit(path, name=name))
                wrong = wrong or (err if isinstance(err, UserError) else None)
        # A file of other columns among good ones is rejected by itself; if all are, the flags or
        # the source must be wrong.
        if wrong and not usable:
            raise wrong
        return found

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the rows of a run of row groups; see `Format.raws`."""
        try:
            with filesystem.open_file(unit.path) as file:
                # pre_buffer would hold whole row groups, which may be gigabytes of images.
                reader = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
                columns = self._columns(reader.schema_arrow.names, unit.path)
                row = sum(reader.metadata.row_group(group).num_rows for group in range(unit.start))
                for group in range(
                    unit.start, reader.num_row_groups if unit.stop < 0 else unit.stop
                ):
                    yield from _rows(reader, group, row, columns, unit)
                    row += reader.metadata.row_group(group).num_rows
        except (UserError, *BROKEN) as err:
            filesystem.raise_if_passing(unit.path, err)
            yield Rejection(unit.prefix, f"the parquet file cannot be read ({_one_line(err)})")

    def record(self, raw: Raw) -> Record:
        """Returns the record of a row; see `Format.record`."""
        return Record(raw.id, "parquet", tuple(raw.fields["images"]), _turns(raw.fields))

    def _columns(self, names: list[str], path: str) -> Columns:
        """Returns the columns to read of a file that has columns `names`.

        Raises:
          UserError: a column is not there, or neither flags nor `KNOWN` tell one that is needed.
        """
        none = Columns("", "", "")
        known = next(
            (columns for columns in KNOWN.values() if set(columns.names()) <= set(names)), none
        )
        # A flag overrides one column of a known set, and leaves the others as they are.
        flags = {key: getattr(self, f"{key}_column") for key in vars(known)}
        columns = dataclasses.replace(known, **{key: name for key, name in flags.items() if name})
        for name in columns.names():
            if name not in names:
                raise UserError(f"{path} has no column {name!r}{nearest(name, names)}")
        if missing := [key for key in ("image", "question", "answer") if not getattr(columns, key)]:
            flags_needed = ", ".join(f"--{key}_column" for key in missing)
            raise UserError(
                f"{path} has columns {', '.join(names)}, of no set that is known; name "
                f"{flags_needed}"
            )
        return columns


def _units(path: str, name: str, metadata: parquet.FileMetaData) -> list[Unit]:
    """Returns runs of row groups of a file with at least `UNIT_ROWS` rows each, but for the last.

    A row group is the smallest piece of a parquet file that can be read on its own.
    """
    found = []
    start = 0
    rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= UNIT_ROWS or group == metadata.num_row_groups - 1:
            found.append(Unit(path, start, group + 1, name))
            start = group + 1
            rows = 0
    return found


def _rows(
    reader: parquet.ParquetFile, group: int, row: int, columns: Columns, unit: Unit
) -> Iterator[Raw | Rejection]:
    """Yields the rows of a row group, whose first row has number `row` in the file."""
    name = unit.prefix
    packed, unpacked = _sizes(reader.metadata.row_group(group))
    if unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
        yield Rejection(
            f"{name}-{row}", f"rows are too large unpacked (row group {group}: {unpacked:,} bytes)"
        )
        return
    try:
        for batch in reader.iter_batches(
            BATCH_ROWS, row_groups=[group], columns=columns.names(), use_threads=False
        ):
            for number in range(batch.num_rows):
                yield _raw(f"{name}-{row}", batch, number, columns, filesystem.parent(unit.path))
                row += 1
    except BROKEN as err:
        filesystem.raise_if_passing(unit.path, err)
        # pyarrow cannot resume after a broken page: the rest of the row group is lost.
        yield Rejection(
            f"{name}-{row}",
            f"rows cannot be read (row group {group} from here on: {_one_line(err)})",
        )


def _sizes(group: parquet.RowGroupMetaData) -> tuple[int, int]:
    """Returns the size of a row group in bytes, (compressed, uncompressed)."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(one.total_compressed_size for one in columns), sum(
        one.total_uncompressed_size for one in columns
    )


def _raw(
    where: str, batch: pa.RecordBatch, number: int, columns: Columns, folder: str
) -> Raw | Rejection:
    """Returns row `number` of a batch with its id (or else `where`), document and images."""
    try:
        values = {key: batch[name][number].as_py() for key, name in vars(columns).items() if name}
        images = _images(values["image"], folder)
        name = where if values.get("id") is None else checks.text_of(values["id"], "id")
        # Rows about one page repeat its image: a hash of it keeps them in one split.
        if values.get("document") is None:
            document = hashlib.blake2b(
                images[0] if images else name.encode(), digest_size=8
            ).hexdigest()
        else:
            document = checks.text_of(values["document"], "document")
    except Reject as err:
        return Rejection(where, str(err))
    except (UnicodeError, *BROKEN) as err:
        return Rejection(where, f"the row cannot be read ({_one_line(err)})")
    return Raw(
        name,
        document,
        {"images": images, "question": values["question"], "answer": values["answer"]},
    )


def _images(value: Any, folder: str) -> list[bytes]:
    """Returns the image files of a cell; raises Reject if one is missing."""
    found = []
    for image in value if isinstance(value, list) else [value]:
        # The `datasets` library stores an image as a struct, with bytes or only a path.
        if isinstance(image, dict):
            path = image.get("path")
            image = image.get("bytes") or (
                files.image(folder, path) if isinstance(path, str) else None
            )
        if not isinstance(image, bytes):
            raise Reject(f"the image is missing ({type(image).__name__} in its column)")
        found.append(image)
    return found


def _turns(fields: Any) -> tuple[Turn, ...]:
    """Returns the turns of a row: one, or as many as its lists of questions and answers have."""
    question = fields["question"]
    answer = fields["answer"]
    # With a single question a list of answers holds alternatives, with a list of questions it
    # holds an entry for each.
    if not isinstance(question, list):
        return (
            Turn(checks.text_of(question, "question"), _by_frequency(checks.answers_of(answer))),
        )
    if not isinstance(answer, list) or len(answer) != len(question):
        raise Reject("a list of questions without as many answers")
    pairs = zip(question, answer, strict=True)
    return tuple(
        Turn(checks.text_of(one, "question"), checks.answers_of(answers)) for one, answers in pairs
    )


def _by_frequency(answers: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the answers with the commonest one first, because training teaches the first.

    TextVQA has the answers of ten people, and its score counts how many of them agree.
    """
    counts = collections.Counter(answers)
    # Stable: answers that are equally common keep the order of the source.
    return tuple(sorted(answers, key=lambda answer: -counts[answer]))


def _one_line(err: Exception) -> str:
    """Returns the message of an exception on one line, or else the name of its type."""
    return " ".join(str(err).split())[:200] or type(err).__name__
