"""What tells one folder that `prepare` wrote from another: its description, a fingerprint of that,
and a checksum of its contents."""

import json
import os
import re
import zlib
from collections.abc import Sequence
from typing import Any

from alignvlm_jax.data import arrays, filesystem
from alignvlm_jax.data.shards import AGAIN, ENDINGS
from alignvlm_jax.errors import UserError

FINGERPRINTED = ("prepare.json", "tokenizer.model", "tokenizer.json", "chat_format.json")
"""Files that tell one prepared folder from another; the last may be edited by hand."""


def fingerprint(*directories: str | os.PathLike) -> str:
    """Returns a checksum that identifies the data in folders, in 8 hex digits.

    It covers the description (`prepare.json`) and the tokenizer of each folder, as far as they
    exist, and not the shards themselves.
    """
    return _fingerprint(directories, FINGERPRINTED)


def description(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns what `prepare` says of a folder that it wrote: the format, its source and options;
    empty where it wrote none."""
    entries = filesystem.listing(directory)
    if FINGERPRINTED[0] not in entries:
        return {}
    path = filesystem.join(os.fspath(directory), FINGERPRINTED[0])
    try:
        found = json.loads(filesystem.read_whole(path, entries[FINGERPRINTED[0]].size))
    except ValueError as err:
        raise UserError(f"{path} is damaged: {err}; {AGAIN}") from err
    return found if isinstance(found, dict) else {}


def contents(*directories: str | os.PathLike, split: str = "") -> str:
    """Returns a line that differs between folders and their incomplete or older copies.

    It has the number and size of their shards and indexes, and a checksum of names, sizes, indexes
    and fingerprint. With a `split` it is of that one's files alone: it stays the same when another
    job writes other splits to the folder.
    """
    is_wanted = re.compile(rf"{split}-\d+-of-\d+\..*|\w+-{split}\.npz" if split else ".*").fullmatch
    # Shards are not read. Small ones may have the same size, but an index has a hash of every
    # record.
    found: list[tuple[str, int]] = []
    checksums: list[dict[str, int]] = []
    for directory in directories:
        entries = filesystem.listing(directory)
        files = sorted(
            (name, entry.size)
            for name, entry in entries.items()
            if name.endswith(ENDINGS) and is_wanted(name)
        )
        indexes = [
            (filesystem.join(os.fspath(directory), name), size)
            for name, size in files
            if name.endswith(".npz")
        ]
        checksums += filesystem.in_threads(lambda one: arrays.checksums(*one), indexes)
        found += files
    whole = "" if split else fingerprint(*directories)
    digest = zlib.crc32(repr((found, checksums, whole)).encode())
    return (
        f"{len(found):,} files of {sum(size for _, size in found):,} bytes, checksum {digest:08x}"
    )


def is_anew(saved: str | None, *directories: str | os.PathLike) -> bool:
    """Whether folders were prepared anew since their fingerprint was `saved`; not where none was,
    or where they are gone or cannot be reached."""
    try:
        is_here = saved and all(map(filesystem.listing, directories))
        return bool(is_here) and not has_fingerprint(saved, *directories)
    except UserError:
        return False


def has_fingerprint(saved: str, *directories: str | os.PathLike) -> bool:
    """Whether `saved` is the fingerprint of these folders, in its present form or an old one.

    The old form did not count a tokenizer.json.
    """
    return saved in (
        fingerprint(*directories),
        _fingerprint(directories, ("prepare.json", "tokenizer.model")),
    )


def _fingerprint(directories: Sequence[str | os.PathLike], names: Sequence[str]) -> str:
    """Returns a checksum of the files of these names in folders, as far as they exist."""
    crc = 0
    for directory in directories:
        entries = filesystem.listing(directory)
        for name in names:
            if name in entries:
                # crc32 continues from `crc`: the result is that of all contents in a row.
                content = filesystem.read_whole(
                    filesystem.join(os.fspath(directory), name), entries[name].size
                )
                crc = zlib.crc32(content, crc)
    return f"{crc:08x}"
