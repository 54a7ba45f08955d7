"""The `jsonl` format: your own data, a JSON object on each line, as `Jsonl.schema` has it."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record, Turn, Word
from alignvlm_jax.errors import closest
from alignvlm_jax.ingest.formats import checks, files, turns
from alignvlm_jax.ingest.formats.base import Defaults, Raw, Reject, Rejection, Unit, option

KEYS = (
    "id",
    "document",
    "source",
    "images",
    "turns",
    "conversation",
    "system",
    "lines",
    "meta",
)
TURN_KEYS = ("question", "answers", "id")
WORD_KEYS = ("text", "box")
OCR_KEYS = ("edges", "confidence")
"""Keys that a word may have besides."""
MEANT = {
    "question": "turns[].question",
    "query": "turns[].question",
    "prompt": "turns[].question",
    "questions": "turns[].question",
    "answer": "turns[].answers",
    "answers": "turns[].answers",
    "label": "turns[].answers",
    "image": "images",
    "image_path": "images",
    "file_name": "images",
    "words": "lines",
    "text": "lines",
    "ocr": "lines",
    "boxes": "lines[][][].box",
    "messages": "--format=docdownstream",
    "conversations": "--format=llava",
}
"""What is meant by keys that other data sets use, where spelling alone would not tell."""


@dataclasses.dataclass(frozen=True)
class Jsonl(Defaults):
    """A JSON lines file, or a folder of them."""

    about: ClassVar[str] = "your own data: images with questions, with their words, or with both"
    schema: ClassVar[str] = """\
A .jsonl (or .ndjson) file with a record a line, or a folder of them:

    images      list of paths from the file's folder (or from --images), gs:// URIs, data URIs, or
                base64 of more than 4,096 characters; PNG, JPEG, TIFF, WEBP, ..., or a page of a
                PDF as "report.pdf#page=3", from 1, drawn at 100 pixels an inch
    turns       list of {"question": text, "answers": list of texts}; the first answer is taught,
                the others count as right too; may be left out where there are lines. An <image> in
                questions for each image says where it stands; without any they come first. A turn
                may have an "id" of its own
    conversation    true where a question may refer to those before it: they keep their order
    system      text that the model is told before the first question; may be left out
    lines       for each image its lines in reading order, each a list of words {"text": text,
                "box": [left, top, right, bottom]} in pixels of the upright image; may be left out.
                A word may have "confidence", from 0 to 1, and "edges", the x at which each of its
                characters begins and the last one ends
    id          unique text; else the file and the byte where the line begins
    document    what is held out together; else the first image's path
    source      name of the data set, by which sources are measured; else jsonl
    meta        anything of your own, which is not read

A question about a page:

    {"images": ["scans/1.png"], "turns": [{"question": "What is the total?", "answers": ["12.50", \
"12,50"]}]}

The words of a page:

    {"images": ["scans/2.png"], "lines": [[[{"text": "Total", "box": [10, 8, 52, 20]}, {"text": \
"12.50", "box": [60, 8, 98, 20]}]]]}"""
    suffixes: ClassVar[tuple[str, ...]] = files.SUFFIXES
    first_key: ClassVar[str] = ""

    images: str = option("", "folder that image paths start from; default: that of the file")

    def units(self, source: str) -> list[Unit]:
        """Returns byte ranges of all files; see `Format.units`."""
        names = files.named(source, filesystem.list_files(source, self.suffixes))
        return [unit for path, name in names.items() for unit in files.line_units(path, name)]

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the objects of a byte range; see `Format.raws`."""
        folder = self.images or filesystem.parent(unit.path)
        # From a folder of the user's own, names mean the same in all files.
        place = Unit(unit.path) if self.images else unit
        for item in files.json_objects(unit):
            yield item if isinstance(item, Rejection) else _raw(*item, folder, place)

    def record(self, raw: Raw) -> Record:
        """Returns the record of an object, with its image files; see `Format.record`."""
        fields = raw.fields
        names = _list(fields.get("images"), "images", str)
        found = [_turn(turn) for turn in _list(fields.get("turns"), "turns", dict)]
        is_conversation = fields.get("conversation")
        if not isinstance(is_conversation, bool | None):
            raise Reject(f"conversation is neither true nor false ({is_conversation!r:.50})")
        system = fields.get("system")
        if not isinstance(system, str | None):
            raise Reject(f"system is no text ({type(system).__name__})")
        if turns.IMAGE_MARK.search(system or ""):
            raise Reject("an image mark in a system turn, where no image can stand")
        return Record(
            raw.id,
            checks.text_of(fields.get("source") or "jsonl", "source"),
            files.images(fields["folder"], names),
            turns.place_images(found, len(names)),
            _pages(fields["lines"]) if fields.get("lines") else (),
            bool(is_conversation),
            (system or "").strip(),
        )


def _raw(where: str, fields: dict[str, Any], at: int, folder: str, place: Unit) -> Raw | Rejection:
    """Returns an object, which begins at byte `at`, with its id and document; they fall back on
    `where` and the first image, which lies in the folder of `place`."""
    # What is no name is left to `record`, whose complaint is about the record and not its place.
    listed = fields.get("images")
    names = ()
    if isinstance(listed, list):
        names = tuple(name for name in listed if isinstance(name, str))
    try:
        _check_keys(fields, KEYS)
        name = where if fields.get("id") is None else checks.text_of(fields["id"], "id")
        images = fields.get("images")
        # Whether `images` is a list of texts is checked in `record`: here it only names a document.
        first = images[0] if isinstance(images, list) and images else None
        document = fields.get("document")
        if document is None and isinstance(first, str):
            document = files.document_of(place, first)
        elif document is None:
            document = name if first is None else first
        document = checks.text_of(document, "document")
    except Reject as err:
        return Rejection(where, str(err), at, names)
    return Raw(name, document, fields | {"folder": folder}, at, names)


def _check_keys(keys: Iterable[str], known: tuple[str, ...], of: str = "") -> None:
    """Raises Reject for keys that are not known: what they say would be left out unseen.

    Args:
      keys: those of an object.
      known: those that it may have.
      of: what the object is, for messages; "" for a record.
    """
    unknown = sorted(set(keys) - set(known))
    if not unknown:
        return
    # What other data sets call so goes before what is spelt alike: an `answer` is no `images`.
    elsewhere = {} if of else MEANT
    meant = [elsewhere.get(key) or closest(key, known) for key in unknown]
    hint = "what is your own goes into `meta` of the record"
    if any(meant):
        hint = f"did you mean {', '.join(dict.fromkeys(filter(None, meant)))}?"
    names = ", ".join(map(repr, unknown))
    plural = "s" if len(unknown) > 1 else ""
    raise Reject(f"unknown key{plural} {names}{of}; known: {', '.join(known)}; {hint}")


def _list(value: Any, name: str, kind: type) -> list:
    """Returns a list of values of `kind`, empty for null; raises Reject for anything else."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise Reject(f"{name} is no list of {'texts' if kind is str else 'objects'}")
    return value


def _turn(fields: dict[str, Any]) -> Turn:
    """Returns a turn of a record; raises Reject if it has no question, or an unknown key."""
    _check_keys(fields, TURN_KEYS, " of a turn")
    # "['a', 'b']", as of a table of another program, would be learnt with its brackets.
    for key in ("question", "answers"):
        checks.refuse_listed(fields.get(key), key)
    return Turn(
        checks.text_of(fields.get("question"), "question"),
        checks.answers_of(fields.get("answers")),
        "" if fields.get("id") is None else checks.text_of(fields["id"], "the id of a turn"),
    )


def _pages(pages: Any) -> tuple:
    """Returns the words of all pages as nested tuples: pages, lines, words."""
    try:
        return tuple(tuple(tuple(map(_word, line)) for line in page) for page in pages)
    except (TypeError, ValueError) as err:
        raise Reject(f"lines are not lists of lists of words with text and box ({err})") from err


def _word(fields: Any) -> Word:
    """Returns a word; raises TypeError or ValueError if its text or its box is unusable."""
    if not isinstance(fields, dict):
        raise TypeError(f"a {type(fields).__name__} stands where a word should")
    if missing := {*WORD_KEYS} - {*fields}:
        raise ValueError(f"a word has no {' and no '.join(sorted(missing))}")
    _check_keys(fields, (*WORD_KEYS, *OCR_KEYS), " of a word")
    text = fields["text"]
    box = fields["box"]
    left, top, right, bottom = map(float, box)
    if not isinstance(text, str):
        raise TypeError("text is no text")
    # Python's JSON reads NaN and Infinity, which pass every comparison below.
    if not all(map(math.isfinite, (left, top, right, bottom))) or left > right or top > bottom:
        raise ValueError(f"no box: {box}")
    edges = _edges(fields.get("edges"), text, left, right, bottom - top)
    return Word(text, (left, top, right, bottom), edges, _confidence(fields.get("confidence")))


def _edges(
    edges: Any, text: str, left: float, right: float, slack: float
) -> tuple[float, ...] | None:
    """Returns where the characters of a word begin and the last one ends; None where nobody says.

    Args:
      edges: what the word has under `edges`.
      text: of the word.
      left: of the word's box; characters may lean out of it.
      right: of the word's box.
      slack: by how much they may, in pixels.

    Raises:
      ValueError: there are not as many as `text` needs, they do not follow each other from left to
        right, or from right to left, or lie outside of the box.
    """
    if edges is None:
        return None
    if not isinstance(edges, list):
        raise TypeError(f"edges of a word are a {type(edges).__name__}")
    if len(edges) != len(text) + 1:
        raise ValueError(f"{len(edges)} edges of {len(text)} characters, {text[:20]!r}; one more")
    numbers = tuple(map(float, edges))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"edges that are no numbers: {edges}")
    # Of Hebrew and Arabic they run from right to left.
    if list(numbers) not in (sorted(numbers), sorted(numbers, reverse=True)):
        raise ValueError(f"edges of {text[:20]!r} go back and forth")
    if min(numbers) < left - slack or max(numbers) > right + slack:
        raise ValueError(
            f"edges of {text[:20]!r} from {min(numbers):g} to {max(numbers):g}, and its box is "
            f"from {left:g} to {right:g}"
        )
    return numbers


def _confidence(value: Any) -> float | None:
    """Returns how sure OCR is of a word; raises ValueError if it is no number from 0 to 1."""
    if value is None:
        return None
    # true is a number to Python, and would be full confidence.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"a confidence of {value!r:.20}; it must be from 0 to 1")
    return float(value)
