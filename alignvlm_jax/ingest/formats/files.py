"""Readers of JSON lines files, and of the images that records name or hold."""

import base64
import binascii
import bisect
import collections
import contextvars
import functools
import io
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from alignvlm_jax.data import filesystem, pdf
from alignvlm_jax.ingest.formats.base import Reject, Rejection, Unit
from alignvlm_jax.storage import faults

MAX_BYTES = 256 << 20
"""Largest size of an image, and of all images of a record, which are in memory several times."""

MAX_PATH = 4096
"""Longest path of an image in characters; a longer text is base64."""
PAGE = "#page="
"""What stands between the path of a PDF and the number of its page, as in links to one."""

ROOTS: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("ROOTS", default=())
"""Folders, beside the one that its paths start from, whose images a record may name; None is any.

Every format reads images by `image`: what a whole run allows need not pass through each of them.
"""


SEEN: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("SEEN", default=None)
"""By path the `version` of local images when they were read, where somebody collects them."""


def version(path: str) -> str:
    """Returns what changes when a local file is written anew; "" where there is none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # also of a name that no file can have
        return ""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def images(folder: str, names: Iterable[str]) -> tuple[bytes, ...]:
    """Returns the image files of a record, as `image` reads each.

    Raises:
      Reject: an image cannot be read, or they are larger than `MAX_BYTES` together.
      UserError: a bucket does not answer.
    """
    # Each image may have what those before it left of the bound on all.
    found = []
    room = MAX_BYTES
    for name in names:
        found.append(image(folder, name, room))
        room -= len(found[-1])
    return tuple(found)


def image(folder: str, name: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the content of an image file, read from a path or decoded from base64.

    Args:
      folder: folder that a relative path starts from.
      name: a path, a gs:// URI, a data URI, or base64 of more than `MAX_PATH` characters. A path
        of a PDF may end in #page=N, from 1; the page is drawn.
      max_bytes: largest size of a file.

    Raises:
      Reject: the file is missing, unreadable, too large or outside of the folders that it may be
        in, the base64 is invalid, or the page is not there, or not named of several.
      UserError: a bucket does not answer. That is no fault of the record, and the run may go on
        later.
    """
    # Linux has no longer paths: the text has to be base64.
    if name.startswith("data:") or len(name) > MAX_PATH:
        return _decode(name.partition("base64,")[2] if name.startswith("data:") else name)
    name, page = split_page(name)
    path = filesystem.join(folder, name)
    if not filesystem.is_readable(path):
        raise Reject(f"an image is neither local nor on gs:// ({name})")
    if not filesystem.is_utf8(path):
        raise Reject(f"an image has a name that is no UTF-8 ({filesystem.escaped(name)})")
    try:
        check_inside(path, folder, name)
        # Before it is read: what is written meanwhile counts as later. Of a bucket each would be
        # a request more.
        if (seen := SEEN.get()) is not None and not filesystem.is_remote(path):
            seen.setdefault(path, version(path))
        return _drawn(filesystem.read(path, max_bytes), name, page)
    except FileNotFoundError as err:
        raise Reject(f"an image is missing ({name})") from err
    except ValueError as err:
        raise Reject(f"an image file cannot be read ({name}: {err})") from err
    except OSError as err:
        if filesystem.is_remote(path):
            raise faults.as_error(
                f"cannot read {path}: {err}; the same command goes on", err
            ) from err
        raise Reject(f"an image file cannot be read ({name}: {err.strerror or err})") from err


def check_inside(path: str, folder: str, name: str) -> None:
    """Raises Reject where a path, that `name` gives from a folder, leaves it and `ROOTS`."""
    roots = ROOTS.get()
    if roots is None:
        return
    # Of a link its target counts; objects in a bucket have none.
    real = path if filesystem.is_remote(path) else os.path.realpath(path)
    for root in (folder, *roots):
        # A source may itself be a link, as to another disk.
        root = root if filesystem.is_remote(root) else os.path.realpath(root or ".")
        if f"{real}/".startswith(f"{root.rstrip('/')}/") and ".." not in real.split("/"):
            return
    raise Reject(f"an image lies outside of its folder ({name}; --allow_outside reads it)")


def split_page(name: str) -> tuple[str, int | None]:
    """Returns the path of an image without #page=N at its end, and N; None where it has none."""
    path, mark, number = name.rpartition(PAGE)
    # Nothing but ASCII digits: int() takes others, too.
    is_page = mark and number.isascii() and number.isdigit() and len(number) < 9
    return (path, int(number)) if is_page else (name, None)


def _drawn(data: bytes, name: str, page: int | None) -> bytes:
    """Returns the content of an image file; of a PDF one page, drawn as `prepare` draws others."""
    if pdf.is_pdf(data):
        try:
            return pdf.encode(pdf.draw_of_file(data, name, page, pdf.DPI))
        except pdf.UnreadablePage as err:
            raise Reject(f"an image is a PDF of which no page can be drawn ({err})") from err
    if page is not None:
        raise Reject(f"an image has no pages, since it is no PDF ({name}{PAGE}{page})")
    return data


def _decode(text: str) -> bytes:
    """Returns the bytes that a base64 text stands for; raises Reject if it is invalid."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise Reject(f"an image is no base64 ({err})") from err


SUFFIXES = (".jsonl", ".ndjson")
UNIT_RECORDS = 1000
MAX_UNITS = 500
"""Most units of a file, so that eight million records do not become thousands of shards."""

MAX_LINE_BYTES = 48 << 20
"""Longest line; a line of nothing but brackets takes thirty times as much memory when parsed."""

SAMPLE_BYTES = 1 << 20
MAX_COUNTED = 1 << 28
"""Bytes of a file up to which a message counts its lines."""
UTF16 = (b"\xff\xfe", b"\xfe\xff")
"""What files in UTF-16 begin with, as spreadsheets write."""


def named(source: str, paths: Iterable[str]) -> dict[str, str]:
    """Returns by path what the ids of its records begin with, for `Unit.name`.

    That is "" for files directly in the source and for those whose name no other has, whose records
    keep the ids that they always had, and `FOLDER/FILE` for others below: files of one name in two
    folders are two documents. Where two files differ in their endings alone, the later ones in the
    order of paths keep theirs.
    """
    found: dict[str, str] = {}
    taken = set()
    paths = list(paths)
    times = collections.Counter(map(filesystem.stem, paths))
    for path in sorted(paths):
        folder = filesystem.parent(inside(source, path))
        stem = filesystem.join(folder, filesystem.stem(path))
        full = filesystem.join(folder, filesystem.name(path))
        is_repeated = times[filesystem.stem(path)] > 1
        found[path] = full if stem in taken else stem if folder and is_repeated else ""
        taken.add(stem)
    return found


def inside(source: str, path: str) -> str:
    """Returns the path of a file of a source from there on; its name if it is the source."""
    # Listed paths may lack slashes that are doubled in the source, or have one more.
    folder = re.sub("/+", "/", f"{source}/")
    path = re.sub("/+", "/", path)
    return path[len(folder) :] if path.startswith(folder) else filesystem.name(path)


def document_of(unit: Unit, image: str) -> str:
    """Returns the document of a record by its first image, as the record names it.

    Files in subfolders name images from there: 1.png of two folders is two documents. A file is one
    document however its path is spelt: as 1.png, ./1.png, or from the root.
    """
    if filesystem.is_remote(image) or image.startswith("data:") or len(image) > MAX_PATH:
        return image if image.startswith("data:") else split_page(image)[0]
    # Its pages are held out together, as those of `formats/pdf` are.
    image, _ = split_page(image)
    if posixpath.isabs(image) and not filesystem.is_remote(unit.path):
        image = posixpath.relpath(image, os.path.abspath(filesystem.parent(unit.path) or "."))
    return posixpath.normpath(posixpath.join(filesystem.parent(unit.name), image))


def line_units(path: str, name: str = "") -> list[Unit]:
    """Returns byte ranges of a file that hold about `UNIT_RECORDS` lines each, with this `name`.

    The mean length of a line is taken from the first `SAMPLE_BYTES`; ranges begin anywhere in a
    line, and `json_objects` gives each line to one of them.
    """
    size = filesystem.size(path)
    with filesystem.open_file(path) as file:
        sample = file.read(min(size, SAMPLE_BYTES))
    step = max(UNIT_RECORDS * len(sample) // (sample.count(b"\n") or 1), -(-size // MAX_UNITS), 1)
    return [Unit(path, start, min(start + step, size), name) for start in range(0, size, step)]


class Parsed(NamedTuple):
    """An object of a file: its place as a name, `FILE-BYTE`, its value, and that byte."""

    where: str
    fields: dict[str, Any]
    at: int


def json_objects(unit: Unit) -> Iterator[Parsed | Rejection]:
    """Yields the objects of the lines that begin in a byte range; what is not a JSON object becomes
    a Rejection."""
    name = unit.prefix
    # Reading begins a byte early: if that byte is a newline, a line begins at `start` itself and
    # must not be skipped.
    at = max(unit.start - 1, 0)
    with filesystem.open_buffered(unit.path, at) as file:
        if unit.start:
            at += _skip_line(file)
        while at < unit.stop:
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            first = at
            where = f"{name}-{first}"
            at = at + len(line)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                at += _skip_line(file)  # its rest, in pieces, never whole in memory
                reason = f"a line is too long (at most {MAX_LINE_BYTES:,} bytes)"
                yield Rejection(where, reason, first)
            elif line.strip():
                item = parse_json(where, line)
                if isinstance(item, Rejection):
                    reason = item.reason.replace("no JSON object", "no JSON object a line", 1)
                    yield Rejection(where, reason, first)
                else:
                    yield Parsed(*item, first)


class Number(float):
    """A number with a fraction, whose text is that of the file: an answer of 12.50 stays one."""

    def __new__(cls, text: str) -> "Number":
        """Returns the number that a text spells."""
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __getnewargs__(self) -> tuple[str]:
        return (self.text,)

    def __str__(self) -> str:
        return self.text


class DoubleKey(ValueError):
    """A key that stands twice in an object; the message is the key."""


def parse_json(where: str, line: bytes) -> tuple[str, dict[str, Any]] | Rejection:
    """Returns (`where`, the object that `line` holds), or a Rejection if it is not one."""
    try:
        # Some editors write a byte order mark; json.loads refuses it.
        text = line.removeprefix(b"\xef\xbb\xbf").decode()
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_float=Number)
    except UnicodeDecodeError as err:
        hint = "; save the file as UTF-8" if line.startswith(UTF16) else ""
        return Rejection(where, f"invalid UTF-8 ({err.reason} at byte {err.start}{hint})")
    except json.JSONDecodeError as err:
        return Rejection(where, f"no JSON object ({err.msg} at column {err.colno})")
    except DoubleKey as err:
        return Rejection(where, f"a key stands twice in an object ({err})")
    except (ValueError, RecursionError) as err:  # deeply nested brackets exhaust the stack
        return Rejection(where, f"no JSON object ({err})")
    if not isinstance(value, dict):
        return Rejection(where, f"no JSON object (a {type(value).__name__})")
    return where, value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON; raises DoubleKey where a key's first value would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(key, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise DoubleKey(repr(key))
    return found


@functools.lru_cache(maxsize=4)
class Places:
    """Where bytes of a file lie, as a person looks for them."""

    def __init__(self, path: str):
        self._path = path
        self._counted = [(0, 0)]  # (byte, newlines before it), ascending

    def spelled(self, at: int) -> str:
        """Returns the line that has a byte, as "line 3"; far into a file, or in a bucket, where
        counting would cost more than it helps, the byte."""
        if at > MAX_COUNTED or filesystem.is_remote(self._path):
            return f"byte {at:,}"
        nearest = bisect.bisect_right(self._counted, (at, at)) - 1
        begin, count = self._counted[nearest]
        # In pieces: a file may be larger than the memory.
        with filesystem.open_buffered(self._path, begin) as file:
            while begin < at and (part := file.read(min(at - begin, SAMPLE_BYTES))):
                count += part.count(b"\n")
                begin += len(part)
        self._counted.insert(nearest + 1, (begin, count))
        return f"line {count + 1:,}"


def _skip_line(file: io.BufferedReader) -> int:
    """Skips the rest of a line of any length; returns the number of bytes skipped."""
    skipped = 0
    while part := file.readline(SAMPLE_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
