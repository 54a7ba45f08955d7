"""The index of a split: lengths and image sizes of its records, for packing without reading them.

`prepare` writes an index file for each shard, and merges them when all are there.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import logging

from alignvlm_jax.data import arrays, chat, chat_template, filesystem, images, shards, tokenizers
from alignvlm_jax.data.chat import ChatTurn
from alignvlm_jax.data.filesystem import Entry
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.tasks import TASKS
from alignvlm_jax.data.tokenizers import base
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import TryAgainError, UserError

RECOUNT = "`python -m alignvlm_jax prepare --recount --out={} --tokenizer={}`"
MANY = 64
FEW = 4
"""Numbers of shards whose own indexes are slow to open, on a disk (MANY) or in a bucket (FEW)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """An index of R records with M images, in the order of `shards.RecordSource`.

    Indexes are compared by identity, and so can be keys of caches.

    Attributes:
      text_tokens: by task of `tasks.TASKS`, the number of tokens of each record's chat with all
        its turns and without image tokens, int32 [R]; 0 if the record lacks what the task needs.
      image_sizes: height and width in pixels of all images, record after record, int32 [M, 2].
      image_starts: record r has the images `image_starts[r]` to `image_starts[r + 1]`, int64
        [R + 1].
      content_hash: hash of the images and turns of each record, uint64 [R].
      tokenizer: fingerprint of the tokenizer that counted.
    """

    text_tokens: dict[str, np.ndarray]
    image_sizes: np.ndarray
    image_starts: np.ndarray
    content_hash: np.ndarray
    tokenizer: str

    def __len__(self) -> int:
        return len(self.content_hash)


class Builder:
    """A builder of an index from records that come one by one and are not kept."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: str):
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._text_tokens: dict[str, list[int]] = {task: [] for task in TASKS}
        self._image_sizes: list[tuple[int, int]] = []
        self._image_starts = [0]
        self._hashes: list[int] = []

    def add(self, record: Record) -> dict[str, int]:
        """Adds a record, and returns its tokens by task, as `text_tokens` does.

        Raises:
          UserError: the size of an image cannot be read.
        """
        sizes = [
            images.image_size(image, f"{i} of record {record.id}")
            for i, image in enumerate(record.images)
        ]
        lengths = text_tokens(record, self._tokenizer)
        self._hashes.append(content_hash(record))
        # Only now, after everything that may raise: a rejected record leaves no trace.
        for task, length in lengths.items():
            self._text_tokens[task].append(length)
        self._image_sizes += sizes
        self._image_starts.append(len(self._image_sizes))
        return lengths

    def build(self) -> Index:
        """Returns the index of all added records."""
        return Index(
            {task: np.array(lengths, np.int32) for task, lengths in self._text_tokens.items()},
            np.array(self._image_sizes, np.int32).reshape(-1, 2),
            np.array(self._image_starts, np.int64),
            np.array(self._hashes, np.uint64),
            self._fingerprint,
        )


def of_records(records: Iterable[Record], tokenizer: Tokenizer, fingerprint: str) -> Index:
    """Returns the index of records; `fingerprint` is that of `tokenizer`."""
    builder = Builder(tokenizer, fingerprint)
    for record in records:
        builder.add(record)
    return builder.build()


def index_path(shard: str | Path) -> Path:
    """Returns the path of the index file of a single shard."""
    return Path(str(shard).removesuffix(".array_record") + ".index.npz")


def merged_name(split: str) -> str:
    """Returns the name of the index file of a whole split."""
    return f"index-{split}.npz"


def write(path: str | Path, index: Index) -> None:
    """Writes an index file in one step: a reader never sees a part of it.

    Raises:
      UserError: the file cannot be written, as on a full disk.
    """
    arrays.write(path, _fields(index))


def read(path: str | Path) -> Index:
    """Returns the index in a local file.

    Raises:
      UserError: it is missing, damaged, or lacks one of `tasks.TASKS`; the message says how to
        count anew.
    """
    return _index(_read(os.fspath(path), 0))


def merge(directory: Path, split: str) -> list[str]:
    """Merges the indexes of all shards of a split into one file, and writes the shards' table.

    The indexes of single shards are left in place. The table (`shards.write_table`) says where the
    records of the shards lie.

    Returns:
      The names of both files.

    Raises:
      UserError: a shard or its index is missing or damaged, or a file cannot be written.
    """
    entries = filesystem.listing(directory)
    names = shards.shard_names(directory, split)
    whole = concatenate([read(index_path(directory / name)) for name in names])
    shards.write_table(directory, split)
    # The sizes tell an index of other shards (`_merged`).
    sizes = np.array([entries[name].size for name in names], np.int64)
    arrays.write(directory / merged_name(split), _fields(whole) | {"shard_sizes": sizes})
    return [merged_name(split), shards.table_name(split)]


def load(directory: str | os.PathLike, split: str) -> Index:
    """Returns the index of a split, over all its shards.

    It is cached for the process, and its arrays are read-only.

    Raises:
      UserError: the split does not exist, a shard has no index, or the indexes are of several
        tokenizers; the message says how to count anew.
    """
    directory = os.fspath(directory)
    # Absolute, since it is a key of the caches below, and the working directory may change.
    place = directory if filesystem.is_remote(directory) else os.path.abspath(directory)
    entries = filesystem.listing(place)
    names = shards.shard_names(place, split)
    if not names:
        shards.RecordSource(directory, split)  # raises, naming the splits that there are
    merged = entries.get(merged_name(split))
    if merged:
        return _merged(place, split, merged, tuple(entries[name].size for name in names))
    indexes = [index_path(name).name for name in names]
    return _of_shards(place, tuple((name, entries.get(name)) for name in indexes))


@functools.lru_cache(maxsize=64)
def _merged(place: str, split: str, entry: Entry, shard_sizes: tuple[int, ...]) -> Index:
    """Returns the merged index of a split, cached for a version of its file and its shards."""
    path = filesystem.join(place, merged_name(split))
    fields = _read(path, entry.size)
    if fields["shard_sizes"].tolist() != list(shard_sizes):
        raise UserError(f"{path} is of other shards; {recount(place)}")
    return _index(fields)


@functools.lru_cache(maxsize=64)
def _of_shards(place: str, indexes: tuple[tuple[str, Entry | None], ...]) -> Index:
    """Returns the index of a folder that has one for each shard, as old ones do."""
    if len(indexes) >= (FEW if filesystem.is_remote(place) else MANY):
        logging.warning(
            "%s has an index for each of %d shards: to open it faster, %s",
            place,
            len(indexes),
            recount(place),
        )

    def of_shard(item: tuple[str, Entry | None]) -> Index:
        path = filesystem.join(place, item[0])
        if item[1] is None:
            raise UserError(f"index {path} is missing; {recount(place)}")
        return _index(_read(path, item[1].size))

    found = filesystem.in_threads(of_shard, indexes)
    if len({one.tokenizer for one in found}) > 1:
        raise UserError(f"{place} was counted by several tokenizers; {recount(place)}")
    whole = concatenate(found)
    for array in (
        *whole.text_tokens.values(),
        whole.image_sizes,
        whole.image_starts,
        whole.content_hash,
    ):
        # The cache hands the same arrays to every caller.
        array.setflags(write=False)
    return whole


def _index_fields() -> list[str]:
    """Returns the fields of an index that are a single array or text."""
    return [field.name for field in dataclasses.fields(Index) if field.name != "text_tokens"]


def _fields(index: Index) -> dict[str, np.ndarray | str]:
    """Returns an index as named arrays, those of tasks as `text_tokens.TASK`."""
    fields = {name: value for name, value in vars(index).items() if name != "text_tokens"}
    return fields | {f"text_tokens.{task}": array for task, array in index.text_tokens.items()}


def _read(path: str, size: int) -> dict[str, np.ndarray]:
    """Returns the named arrays of an index file; raises UserError if some are missing."""
    try:
        fields = arrays.read(path, size)
        names = [*_index_fields(), *(f"text_tokens.{task}" for task in TASKS)]
        missing = [name for name in names if name not in fields]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}")
    # A bucket that does not answer says nothing about the file: to count anew would not help.
    except TryAgainError:
        raise
    except UserError as err:
        raise UserError(f"index {err}; {recount(filesystem.parent(path))}") from err
    return fields


def _index(fields: dict[str, np.ndarray]) -> Index:
    """Returns the index that named arrays hold: the inverse of `_fields`."""
    text_tokens = {task: fields[f"text_tokens.{task}"] for task in TASKS}
    others = {name: fields[name] for name in _index_fields()}
    return Index(text_tokens, **others | {"tokenizer": str(fields["tokenizer"])})


def concatenate(indexes: list[Index]) -> Index:
    """Returns one index of all; they have the same tokenizer."""
    starts = [np.zeros(1, np.int64)]
    # Each begins where the images of those before it end: their starts are moved by so many.
    for one in indexes:
        starts.append(one.image_starts[1:] + starts[-1][-1])
    return Index(
        {task: np.concatenate([one.text_tokens[task] for one in indexes]) for task in TASKS},
        np.concatenate([one.image_sizes for one in indexes]),
        np.concatenate(starts),
        np.concatenate([one.content_hash for one in indexes]),
        indexes[0].tokenizer,
    )


def select(index: Index, records: np.ndarray) -> Index:
    """Returns the index of the records with numbers `records`, int [n]."""
    sizes = [index.image_sizes[index.image_starts[i] : index.image_starts[i + 1]] for i in records]
    return Index(
        {task: lengths[records] for task, lengths in index.text_tokens.items()},
        # The empty array gives shape and dtype where no record has an image.
        np.concatenate([np.zeros((0, 2), np.int32), *sizes]),
        np.cumsum([0, *map(len, sizes)], dtype=np.int64),
        index.content_hash[records],
        index.tokenizer,
    )


def recount(directory: str | Path, tokenizer: str | os.PathLike = "") -> str:
    """Returns the advice for a user whose index does not fit: how to count anew.

    Args:
      directory: the folder of the data.
      tokenizer: by what to count; "" for the one in the folder, where it has one.
    """
    if filesystem.is_remote(directory):
        again = RECOUNT.format("FOLDER", "FOLDER")
        return f"call {again} where {directory} was written, and upload it again"
    own = any((Path(directory) / name).exists() for name in tokenizers.NAMES)
    return f"call {RECOUNT.format(directory, tokenizer or (directory if own else 'FOLDER'))}"


def is_counted(directory: str | os.PathLike) -> bool:
    """Whether a folder has an index of any split; drawn documents have none."""
    return any(
        name.startswith("index-") or name.endswith(".index.npz")
        for name in filesystem.listing(directory)
    )


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """Returns a checksum of a tokenizer's file, and of its chat format where that does not follow
    from its special tokens.

    Raises:
      UserError: it has no chat format.
    """
    chat_format = chat_template.told_apart_by(tokenizer)
    # A chat has as many tokens as its format writes. Folders that were prepared before there were
    # formats of their own keep their checksum: that of the file alone.
    if not chat_format:
        return tokenizer.fingerprint
    return base.fingerprint(f"{tokenizer.fingerprint} {chat_format}".encode())


def tokenizer_fingerprint(path: str | os.PathLike) -> str:
    """Returns `fingerprint_of` the tokenizer in a file, or in a folder, as `tokenizers.load` takes
    it; UserError where it is missing, too."""
    return fingerprint_of(tokenizers.load(path))


def content_hash(record: Record) -> int:
    """Returns a 64-bit hash of a record's images and turns; its id does not count."""
    digest = hashlib.blake2b(digest_size=8)
    # The lengths of the images first, else bytes could move from one image to the next unnoticed.
    digest.update(json.dumps([len(image) for image in record.images]).encode())
    for image in record.images:
        digest.update(image)
    digest.update(json.dumps([(turn.question, turn.answers) for turn in record.turns]).encode())
    # What records of before did not have leaves their hashes as they are.
    if record.has_order or record.system:
        offsets = [turn.image_offsets for turn in record.turns]
        digest.update(json.dumps([record.is_conversation, record.system, offsets]).encode())
    return int.from_bytes(digest.digest(), "big")


def text_tokens(record: Record, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the number of tokens of a record's chat by task, without image tokens."""
    # Tasks often share their turns, which are encoded once; no turns have no tokens.
    counted: dict[tuple[ChatTurn, ...], int] = {(): 0}
    lengths = {}
    for task, turns_of in TASKS.items():
        # Where images stand does not count.
        found = [
            turn._replace(image_offsets=()) for turn in turns_of(record, np.random.default_rng(0))
        ]
        # Sorted: an order of them that was counted is not counted again.
        turns = tuple(found if record.has_order else sorted(found))
        if turns not in counted:
            counted[turns] = chat.count_tokens(
                tokenizer, turns, has_order=record.has_order, system=record.system
            )
        lengths[task] = counted[turns]
    return lengths
