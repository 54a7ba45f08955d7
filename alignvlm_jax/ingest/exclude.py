"""Images that training must not see, as those of a benchmark's test split: found again by their
bytes, and by what they look like.

Pages of text look alike: white, with gray stripes. So the ink alone is looked at, cut out and
scaled, and 256 frequencies of it are compared, of which two pages of text differ in 65 or more, and
a page and its JPEG, its half or its crop in 40 or less. What differs in a few words, as the forms
of one template, is taken for the same; what has ink around it, as a black border, for another page.
"""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from alignvlm_jax.data import arrays, filesystem, images, prepared, read_ahead
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.errors import UserError, counted, nearest

VERSION = 1
"""Version of the perceptual hash, raised with every change to it: others cannot be compared."""
SIDE = 64
"""Pixels of the square that the ink is scaled to."""
FREQUENCIES = 17
"""Along each side, from that of the mean; with those of the other side they make 17 x 17."""
BITS = 256
"""Of these, row by row, the first after the mean of all: the rows 0 to 14, and 2 of row 15."""
MAX_DISTANCE = 46
"""Bits, of `BITS`, in which the hashes of one page differ at most."""
MIN_CONTRAST = 80
"""Gray levels by which ink differs from paper: more than JPEG adds around letters."""
MIN_INK = 0.0005
"""Least fraction of a page that is ink; of others, as blank ones, only bytes are compared."""
MAX_SIDE = 1024
MAX_PAIRS = 3
"""Pairs of images that look alike which are shown."""
EQUAL = "its image is an excluded one"
ALIKE = "its image looks like an excluded one"
"""Why records are dropped, which are counted apart: what looks alike may be another page."""


class Known(NamedTuple):
    """M images of prepared records.

    Attributes:
      names: of the record of each.
      hashes: uint64 [M], of their bytes.
      perceptual: uint64 [M, 4], `perceptual_hash` of each; zeros of one that has none.
    """

    names: list[str]
    hashes: np.ndarray
    perceptual: np.ndarray


def file_name(split: str) -> str:
    """Returns the name of the file that holds the `Known` images of a split."""
    return f"images-{split}.npz"


def hash_of(content: bytes) -> int:
    """Returns 64 bits of BLAKE2b: unlike `hash`, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def perceptual_hash(image: bytes, name: str) -> list[int]:
    """Returns the perceptual hash of an image file: four numbers of 64 bits, zeros of a blank page.

    Raises:
      UserError: the file cannot be decoded; the message has `name`.
    """
    gray = images.decode_image(image, name).convert("L")
    # A coarse one will do, and takes a tenth of the time of a scan's 35 million pixels.
    gray = gray.reduce(max(1, max(gray.size) // MAX_SIDE))
    levels = np.asarray(gray, np.int16)
    # Paper is what there is more of: ink is dark on a bright page, and bright on a dark one.
    is_bright = levels.mean() > (int(levels.min()) + int(levels.max())) / 2
    ink = (
        levels < levels.max() - MIN_CONTRAST if is_bright else levels > levels.min() + MIN_CONTRAST
    )
    if ink.mean() < MIN_INK:
        return [0] * 4
    rows = np.flatnonzero(ink.any(axis=1))
    columns = np.flatnonzero(ink.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    # Margins are cut off with the paper around the ink: a crop of the page keeps its hash.
    square = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX, box), np.float32)
    waves = _waves()
    # A cosine transform, [FREQUENCIES, FREQUENCIES], of which the first is the mean of all.
    found = (waves @ square @ waves.T).ravel()[1 : BITS + 1]
    return np.packbits(found > np.median(found)).view(np.uint64).tolist()


@functools.cache
def _waves() -> np.ndarray:
    """Returns the lowest cosines of `SIDE` places, float32 [FREQUENCIES, SIDE]."""
    places = np.arange(SIDE) + 0.5
    return np.cos(np.pi / SIDE * np.arange(FREQUENCIES)[:, None] * places).astype(np.float32)


def write(path: str | Path, known: Known) -> None:
    """Writes the file of `Known` images; raises UserError where it cannot."""
    names = np.frombuffer(json.dumps(known.names).encode(), np.uint8)
    fields = {"names": names, "hashes": known.hashes, "perceptual": known.perceptual}
    arrays.write(path, fields | {"version": np.array(VERSION)})


def read(path: str, size: int) -> Known | None:
    """Returns the images in a file; None where their hashes are of another `VERSION`. Raises
    UserError where it is damaged."""
    if "version.npy" not in arrays.checksums(path, size):
        return None
    found = arrays.read(path, size, (*Known._fields, "version"))
    if found["version"] != VERSION:
        return None
    return Known(json.loads(found["names"].tobytes()), found["hashes"], found["perceptual"])


def known_of(items: Iterable[tuple[str, int, list[int]]]) -> Known:
    """Returns images, given as (name, hash, perceptual hash)."""
    listed = list(items)  # a name and five numbers each
    return Known(
        [name for name, _, _ in listed],
        np.array([number for _, number, _ in listed], np.uint64),
        np.array([numbers for _, _, numbers in listed], np.uint64).reshape(-1, 4),
    )


def folder_of(excluded: str) -> tuple[str, str]:
    """Returns the folder of FOLDER or FOLDER:SPLIT, and the split; "" for all of them."""
    folder, colon, split = excluded.rpartition(":")
    return (folder, split) if colon and re.fullmatch(r"\w+", split) else (excluded, "")


def contents(excluded: str) -> str:
    """Returns a line that differs where the records of FOLDER or FOLDER:SPLIT do."""
    folder, split = folder_of(excluded)
    return prepared.contents(folder, split=split)


def gather(excluded: Sequence[str], path: Path) -> None:
    """Writes the images of prepared folders to one file.

    Args:
      excluded: each is FOLDER, all of whose splits count, or FOLDER:SPLIT.
      path: the file to write.

    Raises:
      UserError: a folder has no such split, or its records cannot be read.
    """
    found = [one for place in excluded for one in _of_place(place)]
    names = [name for one in found for name in one.names]
    hashes = np.concatenate([one.hashes for one in found])
    write(path, Known(names, hashes, np.concatenate([one.perceptual for one in found])))


def _of_place(excluded: str) -> Iterator[Known]:
    """Yields the images of the splits of a prepared folder."""
    folder, split = folder_of(excluded)
    entries = filesystem.listing(folder)
    splits = shards_lib.split_names(entries)
    if not splits or (split and split not in splits):
        hint = nearest(split, splits) if splits else "; name a folder that `prepare` wrote"
        raise UserError(f"--exclude={excluded} has no shards{' of that split' * bool(split)}{hint}")
    for one in [split] if split else splits:
        kept = entries.get(file_name(one))
        known = read(filesystem.join(folder, file_name(one)), kept.size) if kept else None
        if known is None:
            # Of a folder for training, or of another version: its images are looked at now.
            known = known_of(_hashed(folder, one))
        yield known._replace(names=[f"{record} in {folder}" for record in known.names])


def _hashed(folder: str, split: str) -> Iterator[tuple[str, int, list[int]]]:
    """Yields record and both hashes of the images of a split, out of its shards."""
    source = shards_lib.RecordSource(folder, split)
    for number in range(len(source) + read_ahead.RECORDS):
        if number < len(source):
            source.prefetch(number)
        # In a bucket each is a request: it is read while those before it are looked at.
        if number >= read_ahead.RECORDS:
            record = source[number - read_ahead.RECORDS]
            name = f"of {record.id} in {folder}"
            for image in record.images:
                yield record.id, hash_of(image), perceptual_hash(image, name)


@functools.lru_cache(maxsize=1)
def opened(path: str) -> "Excluded":
    """Returns the excluded images of a file, read once in each worker process."""
    known = read(path, os.path.getsize(path))
    assert known is not None, path  # a job of another version has another staging folder
    return Excluded(known)


class Excluded:
    """Excluded images, to compare others with."""

    def __init__(self, known: Known):
        self._known = known
        self._by_hash = dict(zip(known.hashes.tolist(), known.names, strict=True))
        self._seen = np.flatnonzero(known.perceptual.any(axis=1))
        self._perceptual = known.perceptual[self._seen]

    def reason_against(self, name: str, record_images: Sequence[bytes]) -> str:
        """Returns why a record of this name and images is excluded; "" if it is not."""
        for image in record_images:
            if twin := self._by_hash.get(hash_of(image)):
                return f"{EQUAL} ({twin}, byte for byte)"
            # A blank page equals every other one: it has no hash to compare.
            numbers = np.array(perceptual_hash(image, f"of {name}"), np.uint64)
            if not numbers.any() or not len(self._seen):
                continue
            # Some 40 us for ten thousand images, beside which drawing a page is long.
            distances = np.bitwise_count(self._perceptual ^ numbers).sum(axis=1)
            nearest_one = int(distances.argmin())
            if distances[nearest_one] <= MAX_DISTANCE:
                twin = self._known.names[int(self._seen[nearest_one])]
                return f"{ALIKE} ({twin}, all but {distances[nearest_one]} of {BITS} bits)"
        return ""


def told(reasons: Mapping[str, int], rejected: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns lines about the records that were dropped, with pairs to look at of those that look
    alike; none where none was dropped.

    Args:
      reasons: how many records were rejected, by reason.
      rejected: lines of those that are listed, with `id`, `source` and `reason`.
    """
    counts = [counted(reasons.get(why, 0), "record") for why in (EQUAL, ALIKE)]
    if not {EQUAL, ALIKE} & {*reasons}:
        return []
    head = f"--exclude dropped {counts[0]} by the bytes of an image, and {counts[1]} by its look"
    if ALIKE not in reasons:
        return [head]
    found = (
        f"  {line['id']} ({line.get('source', '')}): {line['reason'].partition(' (')[2][:-1]}"
        for line in rejected
        if line["reason"].startswith(ALIKE)
    )
    return [
        f"{head}, as another form of the same template also has; all are in rejected.jsonl:",
        *itertools.islice(found, MAX_PAIRS),
    ]
