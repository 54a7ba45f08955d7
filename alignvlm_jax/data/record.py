"""The record to which all data sets are converted, and the arrays of a batch."""

import dataclasses
import itertools
import json
from typing import Any, NotRequired, TypedDict

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
      confidence: how sure the program is that read it, from 0 to 1; None where nobody says.
    """

    text: str
    box: Box
    edges: tuple[float, ...] | None = None
    confidence: float | None = None

    @property
    def has_area(self) -> bool:
        """Whether its box is more than a line or a point."""
        left, top, right, bottom = self.box
        return left < right and top < bottom


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question about the images and its accepted answers, of which the first is taught.

    Attributes:
      question: its text.
      answers: the answers that count as right; empty where they are secret.
      id: the name that its data set gives to the question; "" if it gives none.
      image_offsets: the characters of the question before which images stand, ascending. Turns of
        a record have as many together as it has images, in their order, or none has any: all
        images then stand before the first question.
    """

    question: str
    answers: tuple[str, ...]
    id: str = ""
    image_offsets: tuple[int, ...] = ()


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
      is_conversation: whether a turn may refer to those before it; otherwise the turns are
        independent questions, which any order serves.
      system: what the model is told before the first question; "" for nothing.
    """

    id: str
    source: str
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    lines: tuple[tuple[tuple[Word, ...], ...], ...] = ()
    is_conversation: bool = False
    system: str = ""

    @property
    def has_order(self) -> bool:
        """Whether the turns must keep their order: a later one may refer to what an earlier one
        says or shows."""
        return self.is_conversation or any(turn.image_offsets for turn in self.turns)


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
    # bool [B, I, P], the patches with an image token; only with `data.blank_contrast`
    kept_patches: NotRequired[np.ndarray]


def encode_record(record: Record) -> bytes:
    """Returns a record as bytes: a JSON header with the images' sizes, a NUL byte, the images."""
    # Not dataclasses.asdict, which copies every number by itself: a page has thousands.
    header = _fields(record) | {
        "images": [len(image) for image in record.images],
        "turns": [_fields(turn) for turn in record.turns],
        "lines": [[[_fields(word) for word in line] for line in page] for page in record.lines],
    }
    # JSON escapes control characters: the first NUL byte is the separator.
    return b"\0".join([json.dumps(header, separators=(",", ":")).encode(), b"".join(record.images)])


LATER = ("id", "image_offsets", "is_conversation", "system", "confidence")
"""Fields that few records have: where they say nothing they are not written, and a record is the
bytes that it was before there were any."""


def _fields(value: Record | Turn | Word) -> dict[str, Any]:
    return {
        name: field
        for name, field in vars(value).items()
        if name not in LATER or not (field is None or field is False or field in ("", ()))
    }


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
        header["turns"] = tuple(map(_turn, header["turns"]))
        header["lines"] = tuple(
            tuple(tuple(_word(word) for word in line) for line in page) for page in header["lines"]
        )
        return Record(**header)
    except (ValueError, KeyError, TypeError) as err:
        raise UserError(f"not a record of this project ({err})") from err


def _turn(fields: dict[str, Any]) -> Turn:
    """Returns a turn from its JSON fields; records of before have no more than two."""
    tuples = {name: tuple(fields.get(name, ())) for name in ("answers", "image_offsets")}
    return Turn(**fields | tuples)


def _word(fields: dict[str, Any]) -> Word:
    """Returns a word from its JSON fields, in which tuples have become lists."""
    edges = fields["edges"]
    return Word(
        fields["text"],
        tuple(fields["box"]),
        None if edges is None else tuple(edges),
        fields.get("confidence"),
    )
