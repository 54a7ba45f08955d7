"""What planning has to know of records without reading them: lengths and image sizes, in a file beside each shard."""

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from alignvlm_jax.data import chat, images, rows, sources, tokenizer_files
from alignvlm_jax.data.schema import Record
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Index:
    """An entry for each of R records, in the order of `sources.RecordSource`.

    Attributes:
      text_tokens: int32 [R] by task of `rows.TASKS`: tokens of the chat without image slots, all turns in it; 0 where
        the record lacks what the task needs.
      image_sizes: int32 [M, 2], height and width in pixels of all images, record after record.
      image_starts: int64 [R + 1]: record r has `image_sizes[image_starts[r]:image_starts[r + 1]]`.
      content_hash: uint64 [R], of the images and turns.
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
    """Makes an index out of records that come one by one and are not kept."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: str):
        self._tokenizer, self._fingerprint = tokenizer, fingerprint
        self._text_tokens: dict[str, list[int]] = {task: [] for task in rows.TASKS}
        self._image_sizes: list[tuple[int, int]] = []
        self._image_starts = [0]
        self._hashes: list[int] = []

    def add(self, record: Record) -> None:
        """Counts one record; UserError where the size of an image cannot be read."""
        sizes = [images.image_size(image, f"{i} of record {record.id}") for i, image in enumerate(record.images)]
        for task, length in _text_tokens(record, self._tokenizer).items():
            self._text_tokens[task].append(length)
        self._image_sizes += sizes
        self._image_starts.append(len(self._image_sizes))
        self._hashes.append(content_hash(record))

    def build(self) -> Index:
        """Returns the index of what was added."""
        return Index(
            {task: np.array(lengths, np.int32) for task, lengths in self._text_tokens.items()},
            np.array(self._image_sizes, np.int32).reshape(-1, 2),
            np.array(self._image_starts, np.int64),
            np.array(self._hashes, np.uint64),
            self._fingerprint,
        )


def of_records(records: Iterable[Record], tokenizer: Tokenizer, fingerprint: str) -> Index:
    """Returns the index of records, counted by a tokenizer of that `tokenizer_fingerprint`."""
    builder = Builder(tokenizer, fingerprint)
    for record in records:
        builder.add(record)
    return builder.build()


def index_path(shard: str | Path) -> Path:
    """Returns the index file that belongs to a shard."""
    return Path(str(shard).removesuffix(".array_record") + ".index.npz")


def write(path: str | Path, index: Index) -> None:
    """Writes an index file, beside `path` first.

    Raises:
      UserError: it cannot be written, as on a full disk.
    """
    fields = {name: value for name, value in vars(index).items() if name != "text_tokens"}
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            np.savez(file, **fields, **{f"text_tokens.{task}": array for task, array in index.text_tokens.items()})
        os.replace(beside, path)
    except OSError as err:
        raise UserError(f"cannot write {path}: {err.strerror or err}") from err
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | Path) -> Index:
    """Reads an index file.

    Raises:
      UserError: it is missing, damaged, or lacks a task that rows now have; the message says how to count anew.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            fields = dict(arrays)
        text_tokens = {task: fields.pop(f"text_tokens.{task}") for task in rows.TASKS}
        names = [field.name for field in dataclasses.fields(Index) if field.name != "text_tokens"]
        tokenizer = str(fields["tokenizer"])
        return Index(text_tokens, **{name: fields[name] for name in names} | {"tokenizer": tokenizer})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        reason = "is missing" if isinstance(err, FileNotFoundError) else f"cannot be read ({err})"
        raise UserError(f"index {path} {reason}; {recount(Path(path).parent)}") from err


def load(directory: str | Path, split: str) -> Index:
    """Reads the index of a split, all its shards one after another.

    Raises:
      UserError: a shard has none, or they were counted by several tokenizers; the message says what to call.
    """
    shards = sources.shard_paths(directory, split)
    if not shards:
        sources.RecordSource(directory, split)  # says which splits there are
    parts = [read(index_path(shard)) for shard in shards]
    if len({part.tokenizer for part in parts}) > 1:
        raise UserError(f"{directory} was counted by several tokenizers; {recount(directory)}")
    return concatenate(parts)


def concatenate(parts: list[Index]) -> Index:
    """Returns one index of all; they have the same tokenizer."""
    starts = [np.zeros(1, np.int64)]
    for part in parts:
        starts.append(part.image_starts[1:] + starts[-1][-1])
    return Index(
        {task: np.concatenate([part.text_tokens[task] for part in parts]) for task in rows.TASKS},
        np.concatenate([part.image_sizes for part in parts]),
        np.concatenate(starts),
        np.concatenate([part.content_hash for part in parts]),
        parts[0].tokenizer,
    )


def recount(directory: str | Path) -> str:
    """Returns what to tell the user whose index does not fit."""
    return f"call `python -m alignvlm_jax prepare --recount --out={directory} --tokenizer=FOLDER`"


def tokenizer_fingerprint(path: str | Path) -> str:
    """Returns a checksum of the tokenizer's file, or of the one in a folder, as `tokenizer_files.load` takes it."""
    return hashlib.blake2b(tokenizer_files.read(path)[1], digest_size=8).hexdigest()


def content_hash(record: Record) -> int:
    """Returns 64 bits of what the record holds: equal for the same images and turns, whatever the id."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps([len(image) for image in record.images]).encode())
    for image in record.images:
        digest.update(image)
    digest.update(json.dumps([(turn.question, turn.answers) for turn in record.turns]).encode())
    return int.from_bytes(digest.digest(), "big")


def _text_tokens(record: Record, tokenizer: Tokenizer) -> dict[str, int]:
    counted: dict[tuple[tuple[str, str], ...], int] = {(): 0}
    lengths = {}
    for task, turns_of in rows.TASKS.items():
        # Sorted, since each turn is encoded on its own: no order of them changes the length.
        turns = tuple(sorted(turns_of(record, np.random.default_rng(0))))
        if turns not in counted:
            counted[turns] = len(chat.encode_chat(tokenizer, turns, 0, 0)[0])
        lengths[task] = counted[turns]
    return lengths
