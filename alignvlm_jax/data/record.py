"""The one record that all data sets become, and the names of a batch's arrays."""

import dataclasses
import itertools
import json
from typing import Any, TypedDict

import numpy as np

from alignvlm_jax.errors import UserError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the page image."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A drawn word. `edges` are the x coordinates where its characters begin and the last one ends
    (len(text) + 1 numbers), where the source knows them; else characters are taken as equally
    wide."""

    text: str
    box: Box
    edges: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question about the images and the answers accepted for it; the first is the one that is
    taught."""

    question: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One document: encoded images (PNG, JPEG, ...), their words in reading order by lines, and
    turns.

    `lines[i]` are the lines of image i, each a tuple of words; empty where the source does not know
    its words.
    """

    id: str
    source: str
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    lines: tuple[tuple[tuple[Word, ...], ...], ...] = ()


class Batch(TypedDict):
    """What the model trains on.

    Letters: `shapes.py`. Arrays of numpy on the host, of jax on the devices.
    """

    # int32 [B, T], the image placeholder id at image tokens, the pad id after the end
    tokens: np.ndarray
    targets: np.ndarray  # int32 [B, T], the token that position t predicts
    loss_weights: np.ndarray  # float32 [B, T], above 0 where `targets` is part of an answer
    positions: np.ndarray  # int32 [B, T], from 0 within a segment
    segment_ids: np.ndarray  # int32 [B, T], 0 is padding; tokens see their own segment only
    tiles: np.ndarray  # uint8 [B, I, Y, X, C], zeros in unused slots
    patch_label_ids: np.ndarray  # int32 [B, I, P, k]
    # float32 [B, I, P, k], sums to 1 over k on every patch of a used tile
    patch_label_weights: np.ndarray
    patch_loss_weights: np.ndarray  # float32 [B, I, P], 0 where the record does not know its words


def encode_record(record: Record) -> bytes:
    """Serialises a record: a JSON header with image sizes in bytes, a NUL byte, then the images."""
    header = dataclasses.asdict(record) | {"images": [len(image) for image in record.images]}
    return b"\0".join([json.dumps(header, separators=(",", ":")).encode(), b"".join(record.images)])


def decode_record(data: bytes) -> Record:
    """The inverse of `encode_record`.

    Raises:
      UserError: the bytes are not a record.
    """
    try:
        header_bytes, _, blob = data.partition(b"\0")
        header: dict[str, Any] = json.loads(header_bytes)
        ends = np.cumsum([0, *header["images"]])
        header["images"] = tuple(blob[a:b] for a, b in itertools.pairwise(ends))
        header["turns"] = tuple(Turn(t["question"], tuple(t["answers"])) for t in header["turns"])
        header["lines"] = tuple(
            tuple(tuple(_word(word) for word in line) for line in page) for page in header["lines"]
        )
        return Record(**header)
    except (ValueError, KeyError, TypeError) as err:
        raise UserError(f"not a record of this project ({err})") from err


def _word(fields: dict[str, Any]) -> Word:
    edges = fields["edges"]
    return Word(fields["text"], tuple(fields["box"]), None if edges is None else tuple(edges))
