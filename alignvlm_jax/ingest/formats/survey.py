"""What a source holds, for `prepare` without a --format: which formats read it, and what none does.

Files are told by their endings, JSON also by the keys of its first record.
"""

import collections
import dataclasses
import functools
import os
import posixpath
import shlex
from collections.abc import Iterable

from alignvlm_jax.data import filesystem
from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.ingest.formats import REGISTRY, array, files, ocr
from alignvlm_jax.ingest.formats.base import Rejection, Unit
from alignvlm_jax.ingest.formats.images import ENDINGS

IMAGE_ALONE = (
    "An image alone teaches nothing: put OCR beside it (`prepare --format=images --help`), or "
    "write its questions or its words into a jsonl file, as `prepare --format=jsonl --help` shows"
)
NAMING_IMAGES = ("jsonl", "llava", "docdownstream", "parquet", "images")
"""Formats whose records may name image files."""
PAGES = " --holdout_by=page"
"""What a command for a single PDF needs: nothing else of it can be held out."""
JSON = (".json", *files.SUFFIXES)
BROKEN = "broken link"
"""What is no file, and no listing has."""
MAX_OPENED = 100
"""Number of JSON files that are opened; the others are taken for what the last one of them was."""
MAX_KEYS = 6
"""Number of keys of a JSON file that a message names."""
MAX_FIRST_BYTES = 1 << 20
"""Bytes in which the first record of a JSON array has to begin."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a source holds.

    Attributes:
      source: the file or folder.
      by_format: number of files by the name of the format that reads them, the most first.
      images: number of images by ending, without the dot and in capitals.
      others: number of files that nothing reads, by ending likewise.
      unknown: a JSON file that nothing reads, with its keys; "" without one.
    """

    source: str
    by_format: dict[str, int]
    images: dict[str, int]
    others: dict[str, int]
    unknown: str = ""

    def __str__(self) -> str:
        parts = [
            f"{count:,} file{'s' * (count > 1)} for {name}"
            for name, count in self.by_format.items()
        ]
        parts += [_counted("image", self.images)] if self.images else []
        parts += [_counted("other file", self.others)] if self.others else []
        return f"{shown(self.source)}: {'; '.join(parts) or 'nothing'}"

    def format(self, command: str, out: str, flags: str) -> str:
        """Returns the name of the format that reads the source.

        Args:
          command: how `prepare` is called, for messages; so are the next two.
          out: the folder to write to; where several formats read the source, each below it.
          flags: other flags, as a shell takes them.

        Raises:
          UserError: none reads it, or several do; the message says what to do.
        """
        if len(self.by_format) == 1:
            return next(iter(self.by_format))
        if self.by_format:
            commands = "".join(
                f"\n  {command} --format={name} --source={quoted(self.source)} "
                f"--out={quoted(posixpath.join(out, name))} {flags}"
                + PAGES
                * (name == "pdf" and count == 1)
                for name, count in self.by_format.items()
            )
            raise UserError(
                f"{self}. Several formats read it: prepare each into a folder of its own, and mix "
                f"them by config.data.sources{commands}"
            )
        hint = f". {self.unknown}" if self.unknown else ""
        if self.unknown or any(kind in self.others for kind in (".csv", ".tsv", ".xlsx")):
            hint += "; docs/data.md has how tables and JSON of other programs become .jsonl"
        if self.images:
            raise UserError(f"{self}. {IMAGE_ALONE}{hint}")
        kinds = ", ".join(dict.fromkeys(one for kind in REGISTRY.values() for one in kind.suffixes))
        raise UserError(f"{self}. No format reads that: give {kinds}{hint}")

    def about_images(self, name: str) -> str:
        """Returns what becomes of the images beside what format `name` reads; "" without images.

        The formats whose records name image files read them from there.
        """
        if not self.images or name in NAMING_IMAGES:
            return ""
        return f"not read: {_counted('image', self.images)}. {IMAGE_ALONE}"

    def about_unnamed(self, name: str, num_read: int) -> str:
        """Returns a line where there are more images than the records of `name` have read."""
        total = sum(self.images.values())
        if name not in NAMING_IMAGES or total <= num_read:
            return ""
        return (
            f"{shown(self.source)} holds {_counted('image', self.images)}, and records have "
            f"{num_read:,}: those that no record names, or whose record is rejected, are not read"
        )

    def about_files(self, name: str) -> str:
        """Returns what `name` leaves to other formats, and links to nothing; "" without any."""
        rest = {
            f"for --format={other}": count
            for other, count in self.by_format.items()
            if other != name
        }
        rest |= {kind: count for kind, count in self.others.items() if kind == BROKEN}
        found = "; ".join(f"{count:,} {kind}" for kind, count in rest.items())
        return f"beside them: {found}" if rest else ""


def survey(source: str, without: str = "") -> Survey:
    """Returns what a source holds.

    Args:
      source: a file or a folder, local or in a bucket.
      without: a folder within it whose files do not count.

    Raises:
      UserError: there is no such source, or it cannot be reached.
    """
    paths = filesystem.list_files(source, ("",))
    # The source itself is not left out: that it is written to is told by who would write.
    kept, _ = without_prepared(source, without, paths)
    paths = [path for path in paths if path in kept]
    by_format: collections.Counter[str] = collections.Counter()
    images: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    if broken := _num_broken(source):
        others[BROKEN] = broken
    found = _formats(paths)
    unknown = ""
    for path, name in found.items():
        ending = posixpath.splitext(path)[1].lower()
        if name:
            by_format[name] += 1
        elif ending in ENDINGS:
            images[ending[1:].upper()] += 1
        else:
            others[ending or "no ending"] += 1
            unknown = unknown or (_about_keys(path) if ending == ".json" else "")
    # Beside other formats OCR is no wish to read the images: their records may name them.
    if not by_format and (count := _num_with_ocr(found)):
        by_format["images"] = count
    return Survey(source, dict(by_format.most_common()), dict(images), dict(others), unknown)


def without_prepared(
    source: str, out: str | os.PathLike, paths: Iterable[str]
) -> tuple[set[str], list[str]]:
    """Returns the paths of files of a source that lie neither in `out` nor in another folder that
    `prepare` wrote, whose lists of images and of what was rejected are no records; and these other
    folders. Of a bucket, or a source that is a file, all stay."""
    paths = set(paths)
    if filesystem.is_remote(source) or not os.path.isdir(source):
        return paths, []
    root = os.path.abspath(source)
    # Compared with resolved links, but spelled like the paths, which keep the links above.
    below = os.path.relpath(os.path.realpath(out), os.path.realpath(source))
    own = os.path.join(root, below) if out and below != os.curdir else ""

    @functools.cache
    def holder(folder: str) -> str:
        """The folder around this one, or this one itself, that `prepare` wrote; "" for none."""
        if folder == root or len(folder) <= len(root):
            return ""
        is_written = folder == own or _is_prepared(folder)
        return folder if is_written else holder(os.path.dirname(folder))

    # By folder: a source may have a million files.
    holders = {
        folder: holder(os.path.abspath(folder))
        for folder in {os.path.dirname(one) for one in paths}
    }
    kept = {path for path in paths if not holders[os.path.dirname(path)]}
    return kept, sorted({*holders.values()} - {"", own})


def _is_prepared(folder: str) -> bool:
    # Another program may have a prepare.json, but no shards beside it.
    is_described = os.path.exists(os.path.join(folder, "prepare.json"))
    return is_described and any(name.endswith(".array_record") for name in os.listdir(folder))


def _num_with_ocr(paths: Iterable[str]) -> int:
    """Returns how many images have a file of OCR beside them, by its name."""
    # Of JSON the name says little: many programs write one an image.
    stems = {
        posixpath.splitext(path)[0]
        for path in paths
        if path.lower().endswith(ocr.ENDINGS) and not path.lower().endswith(".json")
    }
    images = (path for path in paths if posixpath.splitext(path)[1].lower() in ENDINGS)
    return sum(path in stems or posixpath.splitext(path)[0] in stems for path in images)


def _about_keys(path: str) -> str:
    """Returns what the first object of a JSON file that nothing reads has; "" if there is none."""
    keys = sorted(_first_keys(path))
    shortened = [*keys[:MAX_KEYS], "..."] if len(keys) > MAX_KEYS else keys
    return f"{shown(posixpath.basename(path))} has {shown(', '.join(shortened))}" if keys else ""


def _num_broken(source: str) -> int:
    """Returns how many links of a local folder lead nowhere, as to a disk that is not mounted."""
    if filesystem.is_remote(source):
        return 0
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
    return sum(os.path.islink(path) and not os.path.exists(path) for path in paths)


def _formats(paths: Iterable[str]) -> dict[str, str]:
    """Returns by path the name of the format that reads a file; "" if none does."""
    found = {}
    opened: collections.Counter[str] = collections.Counter()
    last: dict[str, str] = {}
    for path in paths:
        matching = {
            name: kind for name, kind in REGISTRY.items() if path.lower().endswith(kind.suffixes)
        }
        ending = posixpath.splitext(path)[1].lower()
        if ending not in JSON:
            found[path] = next(iter(matching), "")
            continue
        if opened[ending] < MAX_OPENED:
            opened[ending] += 1
            keys = _first_keys(path)
            by_key = [name for name, kind in matching.items() if kind.first_key in keys]
            # The one that takes any object comes last: "" is no key.
            rest = [name for name, kind in matching.items() if not kind.first_key]
            last[ending] = next(iter([*by_key, *rest]), "")
        found[path] = last[ending]
    return found


def _first_keys(path: str) -> set[str]:
    """Returns the keys of the first object of a JSON file; none if it has no such or is broken."""
    try:
        if path.lower().endswith(files.SUFFIXES):
            items = files.json_objects(Unit(path, 0, MAX_FIRST_BYTES))
        else:
            items = array.objects(Unit(path, 0, MAX_FIRST_BYTES), "")
        item = next(items, None)
    except TryAgainError:  # A storage that does not answer says nothing about the file.
        raise
    except (UserError, OSError):
        return set()  # the format itself says why, when it reads the file
    return set() if item is None or isinstance(item, Rejection) else set(item[1])


def _counted(what: str, kinds: dict[str, int]) -> str:
    """Returns a number with what it is of: "3 images (2 PNG, 1 JPG)"."""
    total = sum(kinds.values())
    listed = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return f"{total:,} {what}{'s' * (total > 1)} ({shown(listed)})"


def shown(name: str) -> str:
    """Returns a name for a message of one line: with line breaks escaped."""
    return name if name.isprintable() else repr(name)[1:-1]


def quoted(name: str) -> str:
    """Returns a name as a shell takes it."""
    return shlex.quote(name)
