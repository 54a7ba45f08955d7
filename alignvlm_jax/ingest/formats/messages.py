"""Formats whose records are chats about images: lists of messages of a user and an assistant.

LLaVA and DocDownstream are such formats; they differ in the names of their keys.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from alignvlm_jax.data import filesystem
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.ingest.formats import array, checks, files
from alignvlm_jax.ingest.formats.base import Raw, Reject, Rejection, Unit, option


@dataclasses.dataclass(frozen=True)
class Keys:
    """The names that a format gives to keys and roles.

    Attributes:
      role: key of the role of a message.
      content: key of the text of a message.
      user: role of the messages that ask.
      answerer: role of the messages that answer.
      image_mark: placeholder of an image in a text.
      source: key of the data set that a record is from; "" if there is none.
    """

    role: str
    content: str
    user: str
    answerer: str
    image_mark: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Messages:
    """The base class of formats whose records have messages and `image`, a path or a list of them.

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
            where, fields = item
            # Only the names of images are checked here, for the document; `record` reads the files.
            try:
                names = _image_names(fields)
            except Reject as err:
                yield Rejection(where, str(err))
            else:
                # From a folder of the user's own, names mean the same in all files.
                first = names[0] if names else where
                if names and not self.images:
                    first = files.document_of(unit, first)
                yield Raw(where, first, fields | {"folder": folder})

    def record(self, raw: Raw) -> Record:
        """Returns the record of an object, with its image files; see `Format.record`."""
        turns = _turns(raw.fields.get(self.first_key), self.keys)
        source = raw.fields.get(self.keys.source) or type(self).__name__.lower()
        images = files.images(raw.fields["folder"], _image_names(raw.fields))
        return Record(raw.id, checks.text_of(source, "the data set's name"), images, turns)


def _is_array(path: str) -> bool:
    """Whether a file is one JSON array; all others have an object on each line."""
    return path.lower().endswith(".json")


def _image_names(fields: dict[str, Any]) -> list[str]:
    """Returns the paths of a record's images; raises Reject if they are no strings."""
    names = fields.get("image") or []
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise Reject("image is no path")
    return names


def _turns(messages: Any, keys: Keys) -> tuple[Turn, ...]:
    """Returns the turns of a chat: pairs of a user's message and the answer that follows it.

    A system message in front is left out, and so are the placeholders of images: the model always
    sees the images before the text.

    Raises:
      Reject: the messages are no list of objects, or their roles do not alternate.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise Reject("no list of messages")
    if messages and messages[0].get(keys.role) == "system":
        messages = messages[1:]
    texts = []
    for number, message in enumerate(messages):
        role = message.get(keys.role)
        if role != (keys.answerer if number % 2 else keys.user):
            raise Reject(
                f"messages are not of {keys.user} and {keys.answerer} in turn (message {number}: "
                f"{role!r:.50})"
            )
        text = message.get(keys.content)
        texts.append(
            ""
            if text is None
            else checks.text_of(text, "a message").replace(keys.image_mark, "").strip()
        )
    # zip stops at the shorter list: a last question that nobody answers is left out.
    return tuple(
        Turn(question, (answer,)) for question, answer in zip(texts[::2], texts[1::2], strict=False)
    )


@dataclasses.dataclass(frozen=True)
class Llava(Messages):
    """The format of LLaVA's training data: a JSON or JSON lines file, or a folder of them."""

    about: ClassVar[str] = "LLaVA's: conversations of human and gpt about images, json or jsonl"
    schema: ClassVar[str] = """\
A .json file with one array of records, a .jsonl file with one a line, or a folder of them:

    image            a path from the file's folder (or --images), or a list of them; may be left out
    conversations    messages of "human" and "gpt" in turn; <image> in a text is passed over

    {"image": "scans/1.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is the \
total?"}, {"from": "gpt", "value": "12.50"}]}"""
    suffixes: ClassVar[tuple[str, ...]] = (".json", *files.SUFFIXES)
    first_key: ClassVar[str] = "conversations"
    keys: ClassVar[Keys] = Keys(
        role="from",
        content="value",
        user="human",
        answerer="gpt",
        image_mark="<image>",
    )


@dataclasses.dataclass(frozen=True)
class DocDownstream(Messages):
    """The format of DocDownstream (mPLUG-DocOwl): a JSON lines file, or a folder of them."""

    about: ClassVar[str] = "DocDownstream-1.0's: messages of user and assistant about images, jsonl"
    schema: ClassVar[str] = """\
A .jsonl file with a record a line, or a folder of them:

    image           a path from the file's folder (or --images), or a list of them; may be left out
    messages        of "user" and "assistant" in turn; <|image|> in a text is passed over
    dataset_name    name of the set; may be left out

    {"image": ["scans/1.png"], "messages": [{"role": "user", "content": "<|image|>What is the \
total?"}, {"role": "assistant", "content": "12.50"}]}"""
    suffixes: ClassVar[tuple[str, ...]] = files.SUFFIXES
    first_key: ClassVar[str] = "messages"
    keys: ClassVar[Keys] = Keys(
        role="role",
        content="content",
        user="user",
        answerer="assistant",
        image_mark="<|image|>",
        source="dataset_name",
    )
