"""The record to which all data sets are converted, and the arrays of a batch."""

import dataclasses
import itertools
import json
from typing import Any, TypedDict

import numpy as np

from alignvlm_jax.errors import UserError

Box = tuple[float, float, float, float]
"""A box: left, top, right and bottom in pixels of the page's image."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A word on a page.

    Attributes:
      text: its characters.
      box: the box around it.
      edges: the x coordinates where its characters begin and the last one ends, len(text) + 1
        ascending numbers; None if the source does not know them, and characters are taken as
        equally wide.
    """

    text: str
    box: Box
    edges: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question about the images and its accepted answers, of which the first is taught."""

    question: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """A record: images with their words, and questions about them.

    Attributes:
      id: unique name.
      source: name of the data set or kind of document.
      images: encoded image files (PNG, JPEG, ...).
      turns: questions with their answers.
      lines: for each image its lines in reading order, each a tuple of words; empty if the source
        does not know the words.
    """

    id: str
    source: str
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    lines: tuple[tuple[tuple[Word, ...], ...], ...] = ()


class Batch(TypedDict):
    """A batch of training data, as NumPy arrays on the host and JAX arrays on the devices.

    The axis letters are those of `shapes.py`.
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
    """Returns a record as bytes: a JSON header with the images' sizes, a NUL byte, the images."""
    # JSON escapes control characters: the first NUL byte is the separator.
    header = dataclasses.asdict(record) | {"images": [len(image) for image in record.images]}
    return b"\0".join([json.dumps(header, separators=(",", ":")).encode(), b"".join(record.images)])


def decode_record(data: bytes) -> Record:
    """Returns the record that `encode_record` has encoded.

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
    """Returns a word from its JSON fields, in which tuples have become lists."""
    edges = fields["edges"]
    return Word(fields["text"], tuple(fields["box"]), None if edges is None else tuple(edges))
