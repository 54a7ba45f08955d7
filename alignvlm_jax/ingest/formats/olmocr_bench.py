"""The `olmocr_bench` format: olmOCR-bench, tests of the text of PDF pages, for `evaluate`."""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from alignvlm_jax.data import filesystem
from alignvlm_jax.data import pdf as pdf_lib
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import TryAgainError, UserError, nearest
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Defaults, Raw, Reject, Rejection, Unit, option
from alignvlm_jax.ingest.formats.pdf.document import check_dpi

PDFS = "pdfs"
PAGES_PER_UNIT = 64
BASELINE = "baseline"
"""The type of a test that every PDF has, and the split of those that no file gives."""
COMMON = {"pdf": str, "page": int, "id": str, "type": str}
OPTIONAL = {"max_diffs": int, "checked": str, "url": str}
_SIDES = ("up", "down", "left", "right", "top_heading", "left_heading")
TYPES: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "present": ({"text": str}, {"case_sensitive": bool, "first_n": int, "last_n": int}),
    "absent": ({"text": str}, {"case_sensitive": bool, "first_n": int, "last_n": int}),
    "order": ({"before": str, "after": str}, {}),
    "table": ({"cell": str}, dict.fromkeys(_SIDES, str) | {"ignore_markdown_tables": bool}),
    "baseline": (
        {},
        {"max_length": int, "max_repeats": int}
        | {"max_length_skips_image_alt_tags": bool, "check_disallowed_characters": bool},
    ),
    "math": ({"math": str}, {"ignore_dollar_delimited": bool}),
    "format": ({"text": str, "format": str}, {"case_sensitive": bool}),
    "footnote": ({"marker": str}, {"appears_before_marker": str, "appears_after_marker": str}),
}
"""The keys that a test of each type has, and those that it may have, beside the common ones."""


class Page(NamedTuple):
    """A page with its tests.

    Attributes:
      pdf: path of its PDF, within the folder of these.
      page: its number, from 1.
      tests: JSON objects, in the order of the files.
    """

    pdf: str
    page: int
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OlmocrBench(Defaults):
    """The folder of olmOCR-bench."""

    about: ClassVar[str] = "olmOCR-bench: tests of the text of PDF pages, for `evaluate --tasks`"
    schema: ClassVar[str] = """\
A folder with .jsonl files, one for each split, and the folder pdfs/ beside them. A line is a test:

    pdf         path of a PDF within pdfs/
    page        number of the page, from 1
    id          text, unique in its file
    type        present, absent, order, table, baseline; math, format and footnote are kept, and
                counted as left out by `evaluate`
    max_diffs   edits that are allowed, 0 where it is left out
    ...         what the type needs: text, first_n, last_n, case_sensitive; before, after; cell, up,
                down, left, right, top_heading, left_heading; max_length; math

    {"pdf": "tables/1.pdf", "page": 1, "id": "1_a", "type": "table", "cell": "12.50", "left": \
"Total"}

Each page becomes one record with one question, "Read the page.", whose answers are its tests. A PDF
without a baseline test has one for its first page."""
    suffixes: ClassVar[tuple[str, ...]] = files.SUFFIXES
    first_key: ClassVar[str] = "pdf"

    dpi: int = option(pdf_lib.DPI, "pixels an inch at which pages are drawn")

    def __post_init__(self):
        check_dpi(self.dpi)

    def units(self, source: str) -> list[Unit]:
        """Returns ranges of the pages of each file; see `Format.units`.

        A PDF's pages are with the first file that names it.

        Raises:
          UserError: the source is no such folder.
        """
        # The source may have grown since another job read it.
        _load.cache_clear()
        return [
            Unit(path, start, start + PAGES_PER_UNIT)
            for path, (_, pages) in _load(source).items()
            for start in range(0, len(pages) or 1, PAGES_PER_UNIT)
        ]

    def also_read(self, source: str) -> list[str]:
        """Returns the PDFs whose pages are drawn; see `Format.also_read`."""
        # The files of the units hold tests alone, which stay as they are where a PDF is mended.
        return filesystem.list_files(filesystem.join(source, PDFS), (".pdf",))

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the pages of a range, without drawing them, before the first those lines of the
        file that are no tests; see `Format.raws`."""
        source = filesystem.parent(unit.path)
        (rejections, pages) = _load(source)[unit.path]
        yield from rejections if unit.start == 0 else ()
        # Small enough for a pickle: the page is drawn by whoever makes the record.
        for one in pages[unit.start : unit.stop]:
            fields = {"folder": filesystem.join(source, PDFS), **one._asdict()}
            place = f"page {one.page} of {one.pdf}"
            yield Raw(f"{one.pdf}-{one.page:04d}", one.pdf, fields, place)

    def record(self, raw: Raw) -> Record:
        """Returns the record of a page.

        Raises:
          Reject: the page cannot be read or drawn, or takes too much time or memory.
        """
        fields = raw.fields
        path = filesystem.join(fields["folder"], fields["pdf"])
        files.check_inside(path, fields["folder"], fields["pdf"])
        try:
            data = filesystem.read(path, files.MAX_BYTES)
        except (OSError, ValueError) as err:
            filesystem.raise_if_passing(path, err)
            raise Reject(f"a PDF that cannot be read ({fields['pdf']}: {err})") from err
        # With its words, a page would be an example to learn from: there are tests alone.
        try:
            drawn = pdf_lib.draw_of_file(data, fields["pdf"], fields["page"], self.dpi)
        except pdf_lib.UnreadablePage as err:
            raise Reject(str(err)) from err
        turn = Turn(TRANSCRIBE_QUESTION, tuple(fields["tests"]))
        return Record(raw.id, "olmocr_bench", (pdf_lib.encode(drawn),), (turn,))


@functools.lru_cache(maxsize=1)
def _load(source: str) -> dict[str, tuple[list[Rejection], list[Page]]]:
    """Returns by file what of it is no test, and the pages of those PDFs that it is the first to
    name.

    Raises:
      UserError: the source has no tests, or no folder of PDFs.
    """
    folder = filesystem.join(source, PDFS)
    paths = [
        path
        for path in filesystem.list_files(source, files.SUFFIXES)
        # Below are outputs of models, or what `prepare` wrote.
        if files.inside(source, path) == filesystem.name(path)
    ]
    try:
        pdfs = [files.inside(folder, one) for one in filesystem.list_files(folder, (".pdf",))]
    except TryAgainError:
        raise
    except UserError as err:
        raise UserError(f"{source} is not the folder of olmOCR-bench: {err}") from err
    if not paths:
        raise UserError(f"{source} has a folder {PDFS}, and no .jsonl beside it")
    found: dict[str, dict[tuple[str, int], list[str]]] = {path: defaultdict(list) for path in paths}
    rejections: dict[str, list[Rejection]] = {path: [] for path in paths}
    # By PDF the file that has its pages: a page is one record, however many files test it.
    first: dict[str, str] = {}
    sound = set()
    for path in paths:
        for test in _tests(path, set(pdfs), rejections[path]):
            pdf = test.pop("pdf")
            place = (pdf, test.pop("page"))
            found[first.setdefault(pdf, path)][place].append(json.dumps(test, ensure_ascii=False))
            if test["type"] == BASELINE:
                sound.add(pdf)
    # As the reference adds them; also to a PDF that no test names.
    for pdf in sorted(set(pdfs) - sound):
        test = {"type": BASELINE, "split": BASELINE, "id": f"{pdf}_{BASELINE}"}
        found[first.get(pdf, paths[0])][pdf, 1].append(json.dumps(test))
    return {
        path: (rejections[path], [Page(*place, tuple(tests)) for place, tests in pages.items()])
        for path, pages in found.items()
    }


def _tests(path: str, pdfs: set[str], rejections: list[Rejection]) -> Iterator[dict[str, Any]]:
    """Yields the tests of a file, with its name as their split; appends to `rejections`."""
    # An id is how a test is told from others in its file; other files may have it again.
    seen = set()
    for item in files.json_objects(Unit(path, 0, filesystem.size(path))):
        if isinstance(item, Rejection):
            rejections.append(item)
            continue
        (where, fields, at) = item
        try:
            test = _checked(fields, pdfs)
            if test["id"] in seen:
                raise Reject(f"a test of the id {test['id']!r} came before")
        except Reject as err:
            rejections.append(Rejection(where, str(err), at))
            continue
        seen.add(test["id"])
        # The one thing that a test does not say itself.
        yield test | {"split": filesystem.stem(path)}


def _checked(fields: Mapping[str, Any], pdfs: set[str]) -> dict[str, Any]:
    """Returns a test without the keys that only say where it comes from.

    Raises:
      Reject: a key is missing, unknown or of another type, or a value makes no sense.
    """
    # What all tests may have is null in those that have it not.
    fields = {key: value for key, value in fields.items() if value is not None}
    kind = fields.get("type")
    if kind not in TYPES:
        raise Reject(f"no type of test: {kind!r}{nearest(str(kind), TYPES)}")
    (needed, optional) = TYPES[kind]
    needed = COMMON | needed
    known = needed | OPTIONAL | optional
    # The reference refuses a whole file for any of these.
    for key, value in fields.items():
        if key not in known:
            raise Reject(f"unknown key {key!r} of a {kind} test{nearest(key, known)}")
        # A bool is an int to Python.
        if type(value) is not known[key]:
            raise Reject(f"{key} of a test is no {known[key].__name__}: {value!r}")
        # Only a cell may be empty.
        if key in needed and key != "cell" and value == "":
            raise Reject(f"{key} of a test is empty")
    if missing := needed.keys() - fields:
        raise Reject(f"a {kind} test has no {' and no '.join(sorted(missing))}")
    if fields["page"] < 1 or fields.get("max_diffs", 0) < 0:
        raise Reject(f"page {fields['page']}, max_diffs {fields.get('max_diffs', 0)}: no such test")
    if fields["pdf"] not in pdfs:
        raise Reject(f"{PDFS}/ has no {fields['pdf']!r}{nearest(fields['pdf'], pdfs)}")
    return {key: value for key, value in fields.items() if key not in ("checked", "url")}
