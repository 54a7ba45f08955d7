"""The `parquet` format: question-answer sets as the Hugging Face hub has them.

Images are bytes, paths, structs of bytes and path, or lists of these; or a PDF, or columns with a
page each. Which columns are read comes from flags, or else from the set that `hub.known_sets` tells
by the columns of a file.
"""

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from alignvlm_jax.data import filesystem
from alignvlm_jax.data import pdf as pdf_lib
from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UserError, counted, one_line
from alignvlm_jax.ingest.formats import checks, files, turns
from alignvlm_jax.ingest.formats.base import (
    Defaults,
    Raw,
    Reject,
    Rejection,
    Unit,
    names_of,
    option,
)
from alignvlm_jax.ingest.formats.hub import cells, choice, filters, known_sets, pdf_pages, rows
from alignvlm_jax.ingest.formats.hub.choice import Chosen
from alignvlm_jax.ingest.formats.pdf import document

UNIT_ROWS = 1000
BATCH_ROWS = 16
"""Number of rows in memory at a time, each with its images."""

MAX_UNPACKED = 768 << 20
MAX_RATIO = 20
"""Largest ratio of unpacked to packed size of a row group that is larger than `MAX_UNPACKED`.

Image files do not compress: a row group above both limits holds something else, and pyarrow would
unpack it in one piece, which takes twice its size.
"""

MAX_NOTED = 100
"""Files of which `notes` reads the columns."""

MAX_SOURCE = 200
"""Longest name of a data set: metrics have a line for each."""

NAME = "parquet"
IMAGES = ("image", "pdf")
"""What of `known_sets.Columns` holds images; all else are plain values."""

# What pyarrow raises for files that are not parquet, or damaged.
BROKEN = (pa.ArrowException, OSError, ValueError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Parquet(Defaults):
    """The format of a parquet file, or of a folder of them."""

    about: ClassVar[str] = (
        "question-answer sets with their images, as the Hugging Face hub has them"
    )
    schema: ClassVar[str] = f"""\
A parquet file, or a folder of them. A row is a record, its columns named by flags:

    image       bytes, a struct of bytes and path, a path, or a list of these
    question    text, or a list of texts
    answer      text, a list of answers that are all right, or a list with one for each question
    choices     a list of texts, which are written below the question

Without flags, the columns of a known set are taken:

    {", ".join(list(known_sets.BY_NAME)[:7])},
    {", ".join(list(known_sets.BY_NAME)[7:16])},
    {", ".join(list(known_sets.BY_NAME)[16:])}

A row of such a set:

    image: {{"bytes": ..., "path": "1.png"}}, question: "What is the total?", answers: ["12.50"]"""
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
    choices_column: str = option("", "column of the choices of a question")
    context_column: str = option("", "column of a text that stands before the question")
    source_column: str = option("", "column of the data set that a row is from")
    known_set: str = option("", "the set that files are of; default: it is told by their columns")
    ignore_columns: str = option("", "columns, joined by commas, that are taken as not there")
    answer_field: str = option("", "where the answer stands in a JSON value, as a.b")
    prompt: str = option("", "question of all rows, for a set without questions")
    filter: str = option(
        "", 'rows to keep, as "image_correspondence_min>=4"; several conditions joined by commas'
    )
    dpi: int = option(pdf_lib.DPI, "pixels an inch at which pages of PDFs are drawn")

    def __post_init__(self):
        filters.parse(self.filter)  # raises before anything is read
        self._ignored()
        document.check_dpi(self.dpi)

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
                    self._choose(reader.schema_arrow, path)
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

    def notes(self, source: str) -> Iterator[str]:
        """Yields lines that say of which sets the files of a source are, and what told them."""
        paths = filesystem.list_files(source, self.suffixes)
        by_set = defaultdict(list)
        for path in paths[:MAX_NOTED]:
            try:
                with filesystem.open_file(path) as file:
                    schema = parquet.ParquetFile(file).schema_arrow
                chosen = self._choose(schema, path)
            except (UserError, *BROKEN):
                # `units` has raised what concerns all, and `raws` rejects the others one by one.
                continue
            read = {*chosen.names(), *(one.column for one in filters.parse(self.filter))}
            unread = [name for name in schema.names if name not in read]
            rest = f"; not read: {', '.join(unread)}" if unread else ""
            by_set[f"read as {chosen.known.name} ({chosen.why}){rest}"].append(path)
        for line, found in by_set.items():
            beyond = f" of {len(paths):,}" if len(paths) > MAX_NOTED else ""
            yield f"{filesystem.name(found[0])}, {counted(len(found), 'file')}{beyond}: {line}"

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the rows of a run of row groups; see `Format.raws`."""
        try:
            with filesystem.open_file(unit.path) as file:
                # pre_buffer would hold whole row groups, which may be gigabytes of images.
                reader = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
                try:
                    chosen = self._choose(reader.schema_arrow, unit.path)
                except UserError as err:
                    yield Rejection(unit.prefix, f"the parquet file cannot be read ({err})")
                    return
                row = sum(reader.metadata.row_group(group).num_rows for group in range(unit.start))
                for group in range(
                    unit.start, reader.num_row_groups if unit.stop < 0 else unit.stop
                ):
                    yield from self._rows(reader, group, row, chosen, unit)
                    row += reader.metadata.row_group(group).num_rows
        except BROKEN as err:
            # Not UserError, which the images of rows raise where a bucket or this machine fails.
            filesystem.raise_if_passing(unit.path, err)
            yield Rejection(unit.prefix, f"the parquet file cannot be read ({one_line(err)})")

    def record(self, raw: Raw) -> Record:
        """Returns the record of a row; see `Format.record`."""
        values = raw.fields["values"]
        images = tuple(raw.fields["images"])
        lines = ()
        if "pdf" in raw.fields:
            images, lines = pdf_pages.all_pages(raw.fields["pdf"], self.dpi)
        content = rows.READERS[raw.fields["reader"]]({**values, "images": images})
        # What its column says, or its texts.
        source = content.source or NAME
        if values.get("source"):
            source = checks.text_of(values["source"], "the data set's name")
        # The set has the word None in most rows.
        if values.get("way") not in (None, "", "None"):
            source = f"{source}/{checks.text_of(values['way'], 'the way of evaluation')}"
        if len(source) > MAX_SOURCE:
            raise Reject(f"the data set's name is too long ({len(source):,} characters)")
        return Record(
            raw.id,
            source,
            images,
            # Also of plain questions: many sets write <image> in front.
            turns.place_images(content.turns, len(images)),
            lines,
            content.is_conversation,
            content.system,
        )

    def _ignored(self) -> tuple[str, ...]:
        """Returns the columns that the user says are not needed."""
        names = self.ignore_columns
        return names_of(names, "--ignore_columns") if names else ()

    def _choose(self, schema: pa.Schema, path: str) -> Chosen:
        """Returns the set that a file with this schema is of, and what is read of it.

        Raises:
          UserError: as `choice.choose` and `filters.check`.
        """
        types = dict(zip(schema.names, map(str, schema.types), strict=True))
        filters.check(filters.parse(self.filter), types, path)
        # The flags --ROLE_column, by what the column holds.
        flags = {
            name.removesuffix("_column"): value
            for name, value in vars(self).items()
            if name.endswith("_column")
        }
        return choice.choose(
            schema.names,
            path,
            flags=flags,
            wanted=self.known_set,
            ignored=self._ignored(),
            prompt=self.prompt,
            answer_field=self.answer_field,
        )

    def _rows(
        self, reader: parquet.ParquetFile, group: int, row: int, chosen: Chosen, unit: Unit
    ) -> Iterator[Raw | Rejection]:
        """Yields the rows of a row group, whose first row has number `row` in the file."""
        name = unit.prefix
        packed, unpacked = _sizes(reader.metadata.row_group(group))
        if unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
            yield Rejection(
                f"{name}-{row}",
                f"rows are too large unpacked (row group {group}: {unpacked:,} bytes)",
                f"row {row + 1:,}",
            )
            return
        conditions = filters.parse(self.filter)
        columns = {*chosen.names(), *(condition.column for condition in conditions)}
        try:
            for batch in reader.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=sorted(columns), use_threads=False
            ):
                for number in range(batch.num_rows):
                    one = self._raw(f"{name}-{row}", batch.slice(number, 1), chosen, unit)
                    # As people count: the first row is row 1.
                    yield one._replace(place=f"row {row + 1:,}")
                    row += 1
        except BROKEN as err:
            filesystem.raise_if_passing(unit.path, err)
            # pyarrow cannot resume after a broken page: the rest of the row group is lost.
            yield Rejection(
                f"{name}-{row}",
                f"rows cannot be read (row group {group} from here on: {one_line(err)})",
                f"row {row + 1:,}",
            )

    def _raw(
        self, where: str, batch: pa.RecordBatch, chosen: Chosen, unit: Unit
    ) -> Raw | Rejection:
        """Returns the row of a batch of one, with its id (or else `where`) and document."""
        try:
            conditions = filters.parse(self.filter)
            rated = {one.column: batch[one.column][0].as_py() for one in conditions}
            # First: what is left out need not be decoded.
            if reason := filters.reason_against(conditions, rated):
                return Rejection(where, reason)
            held = dataclasses.asdict(chosen.columns) | {"pages": ""}
            values = {role: _value(batch[name]) for role, name in held.items() if name}
            found = _images(values, batch, chosen, filesystem.parent(unit.path))
            name = where if values.get("id") is None else checks.text_of(values["id"], "id")
            document = _document(values, found, name)
        except Reject as err:
            return Rejection(where, str(err))
        except (UnicodeError, ArithmeticError, *BROKEN) as err:  # dates beyond Python's
            return Rejection(where, f"the row cannot be read ({one_line(err)})")
        plain = {role: value for role, value in values.items() if role not in IMAGES}
        plain["answer_field"] = self.answer_field or chosen.known.answer_field
        plain["prompt"] = chosen.known.prompt
        plain["answer_column"] = chosen.columns.answer
        return Raw(name, document, {"reader": chosen.turns, "values": plain, **found})


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


def _value(cell: pa.Array) -> Any:
    """Returns the value of a column of one row."""
    value = cell[0].as_py()
    kind = cell.type
    kind = kind.value_type if pa.types.is_list(kind) else kind
    # 0.1 of 32 bits is 0.10000000149 of 64: as text it keeps the digits that it was given. What is
    # no number stays one that says so.
    if kind != pa.float32() or value is None:
        return value
    if isinstance(value, float):
        return str(np.float32(value)) if math.isfinite(value) else value
    known = (one is not None and math.isfinite(one) for one in value)
    return [
        str(np.float32(one)) if is_known else one
        for one, is_known in zip(value, known, strict=True)
    ]


def _sizes(group: parquet.RowGroupMetaData) -> tuple[int, int]:
    """Returns the size of a row group in bytes, (compressed, uncompressed)."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(one.total_compressed_size for one in columns), sum(
        one.total_uncompressed_size for one in columns
    )


def _images(
    values: Mapping[str, Any], batch: pa.RecordBatch, chosen: Chosen, folder: str
) -> dict[str, Any]:
    """Returns the image files of a row as `images`, with the PDF, if that is what it has, as `pdf`;
    raises Reject if one is missing."""
    if "image" in values:
        return {"images": cells.images(values["image"], folder, chosen.known.without_image)}
    if chosen.pages:
        return {"images": cells.pages([batch[name][0].as_py() for name in chosen.pages], folder)}
    [data] = cells.images(values["pdf"], folder)
    if not pdf_lib.is_pdf(data):
        raise Reject("the PDF is none")
    return {"images": [], "pdf": data}


def _document(values: Mapping[str, Any], found: Mapping[str, Any], name: str) -> str:
    """Returns the document of a row: what its column says, or else a hash of its image."""
    if values.get("document") is not None:
        return checks.text_of(values["document"], "document")
    # Rows about one page repeat its image: a hash of it keeps them in one split.
    first = found.get("pdf") or next(iter(found["images"]), name.encode())
    return hashlib.blake2b(first, digest_size=8).hexdigest()
