"""Formats whose records are chats about images: lists of messages of a user and an assistant.

LLaVA and DocDownstream are such formats; they differ in the names of their keys.
"""

import dataclasses
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record
from alignvlm_jax.ingest.formats import array, checks, files, turns
from alignvlm_jax.ingest.formats.base import Defaults, Raw, Reject, Rejection, Unit, option

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pdf")
READ = ("image", "images", "folder", "id")
"""Keys of a record that are read, beside its messages, or name no file to look at."""
NAMES_IMAGE = re.compile(r"im(age|g)|picture|photo|figure|frame|page|scan", re.IGNORECASE)
"""What is in a key that names an image, and not where one is from."""
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm")


@dataclasses.dataclass(frozen=True)
class Keys:
    """The names that a format gives to its keys.

    Attributes:
      role: key of who speaks in a message.
      content: key of what is said.
      source: key of the data set that a record is from; "" if there is none.
    """

    role: str
    content: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Messages(Defaults):
    """The base class of formats whose records have messages and `image` or `images`, a path or a
    list of them.

    `first_key` is the key of the messages. A `.json` is one array, others have an object a line.
    Sources give no id that is unique: a record is named by its file and the byte where it begins.
    Its document is the path of its first image.
    """

    keys: ClassVar[Keys]
    images: str = option("", "folder that image paths start from; default: that of the file")

    def units(self, source: str) -> list[Unit]:
        """Returns byte ranges of all files; see `Format.units`.

        JSON arrays are read through once, to find where their elements begin.
        """
        found = []
        names = files.named(source, filesystem.list_files(source, self.suffixes))
        for path, name in names.items():
            found += (
                array.units(path, self.first_key, name)
                if _is_array(path)
                else files.line_units(path, name)
            )
        return found

    def raws(self, unit: Unit) -> Iterator[Raw | Rejection]:
        """Yields the objects of a byte range; see `Format.raws`."""
        folder = self.images or filesystem.parent(unit.path)
        objects = (
            array.objects(unit, self.first_key)
            if _is_array(unit.path)
            else files.json_objects(unit)
        )
        for item in objects:
            if isinstance(item, Rejection):
                yield item
                continue
            where, fields, at = item
            # Only the names of images are checked here, for the document; `record` reads the files.
            try:
                names = _image_names(fields)
            except Reject as err:
                yield Rejection(where, str(err), at)
            else:
                # From a folder of the user's own, names mean the same in all files.
                first = names[0] if names else where
                if names and not self.images:
                    first = files.document_of(unit, first)
                yield Raw(where, first, fields | {"folder": folder}, at, tuple(names))

    def record(self, raw: Raw) -> Record:
        """Returns the record of an object, with its image files; see `Format.record`."""
        fields = raw.fields
        chat = turns.of_messages(fields.get(self.first_key), self.keys.role, self.keys.content)
        names = _image_names(fields)
        if names and chat.images:
            raise Reject("images stand both in the messages and beside them")
        # OpenAI's parts name their images themselves.
        names = names or list(chat.images)
        _check_unread(fields, self.keys, names)
        images = files.images(fields["folder"], names)
        # Some sets of LLaVA's shape have the system turn beside the messages.
        told = checks.text_of(fields.get("system") or "", "system").strip()
        if told and chat.system:
            raise Reject("a system turn stands both in the messages and beside them")
        source = fields.get(self.keys.source) or type(self).__name__.lower()
        return Record(
            raw.id,
            checks.text_of(source, "the data set's name"),
            images,
            turns.place_images(chat.turns, len(images)),
            is_conversation=len(chat.turns) > 1,
            system=chat.system or told,
        )


def _is_array(path: str) -> bool:
    """Whether a file is one JSON array; all others have an object on each line."""
    return path.lower().endswith(".json")


def _image_names(fields: dict[str, Any]) -> list[str]:
    """Returns the paths of a record's images; raises Reject if they are no strings."""
    # Null and an empty list are what sets write for a record of text alone.
    found = [fields[key] for key in ("image", "images") if fields.get(key)]
    if len(found) > 1:
        raise Reject("image and images both stand in a record")
    names = found[0] if found else []
    names = names if isinstance(names, list) else [names]
    # As the `datasets` library writes an image that is a file.
    names = [
        name["path"]
        if isinstance(name, dict) and not name.get("bytes") and name.get("path")
        else name
        for name in names
    ]
    if not all(isinstance(name, str) for name in names):
        raise Reject("image is no path")
    return names


def _check_unread(fields: Mapping[str, Any], keys: Keys, names: list[str]) -> None:
    """Raises Reject where a key that is not read names a file to look at: without it, the model
    would learn to answer blindly.

    Args:
      fields: a record.
      keys: those of the format.
      names: the images that are read.
    """
    stems = {_stem(name) for name in names}
    rest = {key: value for key, value in fields.items() if key not in READ}
    for key, text in _texts_within("", rest, (keys.role, keys.content)):
        ending = posixpath.splitext(text)[1].lower()
        if len(text) > files.MAX_PATH or "\n" in text:
            continue
        if ending in VIDEOS:
            raise Reject(f"key {key!r} names a video, which is not read ({text:.100})")
        if ending not in PICTURES or _stem(text) in stems:
            continue
        # Beside an image, where a file is from need not be seen.
        if not names or (NAMES_IMAGE.search(key) and "://" not in text):
            raise Reject(f"key {key!r} names an image ({text:.100}), and `image` is read")


def _texts_within(key: str, value: Any, read: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields the texts within a value, each with the key that it stands at, but for the keys of a
    message that are read."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for one in value:
            yield from _texts_within(key, one, read)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name not in read:
                yield from _texts_within(name, one, read)


def _stem(name: str) -> str:
    """Returns the name of a file without its folder and its ending."""
    return posixpath.splitext(posixpath.basename(files.split_page(name)[0]))[0]


@dataclasses.dataclass(frozen=True)
class Llava(Messages):
    """The format of LLaVA's training data: a JSON or JSON lines file, or a folder of them."""

    about: ClassVar[str] = "LLaVA's: conversations of human and gpt about images, json or jsonl"
    schema: ClassVar[str] = """\
A .json file with one array of records, a .jsonl file with one a line, or a folder of them:

    image            a path from the file's folder (or --images) or a list of them, as `images` too;
                     may be left out
    conversations    messages of "human" and "gpt" in turn, after a "system" message if any; an
                     <image> for each image says where it stands, without any they come first

    {"image": "scans/1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is the \
total?"}, {"from": "gpt", "value": "12.50"}]}"""
    suffixes: ClassVar[tuple[str, ...]] = (".json", *files.SUFFIXES)
    first_key: ClassVar[str] = "conversations"
    keys: ClassVar[Keys] = Keys(role="from", content="value")


@dataclasses.dataclass(frozen=True)
class DocDownstream(Messages):
    """The format of DocDownstream (mPLUG-DocOwl): a JSON lines file, or a folder of them."""

    about: ClassVar[str] = "DocDownstream-1.0's: messages of user and assistant about images, jsonl"
    schema: ClassVar[str] = """\
A .jsonl file with a record a line, or a folder of them:

    image           a path from the file's folder (or --images) or a list of them, as `images` too;
                    may be left out
    messages        of "user" and "assistant" in turn, after a "system" message if any; an <|image|>
                    for each image says where it stands, without any they come first; parts of
                    type text and image, as OpenAI has them, are read, too
    dataset_name    name of the set; may be left out

    {"image": ["scans/1.png"], "messages": [{"role": "user", "content": "<|image|>What is the \
total?"}, {"role": "assistant", "content": "12.50"}]}"""
    suffixes: ClassVar[tuple[str, ...]] = files.SUFFIXES
    first_key: ClassVar[str] = "messages"
    keys: ClassVar[Keys] = Keys(role="role", content="content", source="dataset_name")
