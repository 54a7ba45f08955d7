"""One HTML file of training sequences as the model gets them: records and their borders, tiles,
text with the loss mask."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alignvlm_jax import storage
from alignvlm_jax.data.examples import ExampleBuilder, Segment
from alignvlm_jax.ingest.statistics import Statistics
from alignvlm_jax.pictures import html

FILE = "rows.html"
THUMBNAIL = 220
"""Pixels of a tile's longer side."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of tokens: "text" that is read only, "taught" text that the loss is on, "special"
    tokens by their names, or the image tokens of one or several tiles ("image")."""

    kind: str
    text: str
    count: int


@dataclasses.dataclass(frozen=True)
class ShownSegment:
    """What one record brings to a packed sequence. `tiles` are pictures as data URIs."""

    number: int
    name: str
    spans: Sequence[Span]
    tiles: Sequence[str]
    num_tokens: int
    num_taught: int
    loss_weight: float


@dataclasses.dataclass(frozen=True)
class View:
    """A packed sequence to be looked at."""

    index: int
    length: int
    max_tiles: int
    segments: Sequence[ShownSegment]

    @property
    def packing_efficiency(self) -> float:
        """The fraction of the sequence's tokens that are no padding."""
        return sum(segment.num_tokens for segment in self.segments) / self.length


def view(index: int, segments: Sequence[tuple[str, Segment]], builder: ExampleBuilder) -> View:
    """Returns packed sequence number `index` of a stage to be looked at, made of segments, each
    with its record's id, by the builder that made them."""
    shown = []
    for number, (name, segment) in enumerate(segments):
        # The weight at t is of predicting t + 1, and the first token of a record is predicted by
        # none.
        is_taught = np.append(False, segment.loss_weights[:-1] > 0)
        shown.append(
            ShownSegment(
                number=number,
                name=name,
                spans=list(_spans(segment.tokens, is_taught, builder)),
                tiles=[_thumbnail(tile) for tile in segment.tile_arrays["tiles"]],
                num_tokens=len(segment.tokens),
                num_taught=int(is_taught.sum()),
                loss_weight=float(segment.loss_weights.sum()),
            )
        )
    return View(index, builder.data.seq_len, builder.data.max_tiles, shown)


def build(views: Iterable[View], statistics: Statistics, path: Path) -> Path:
    """Writes the page and returns its path."""
    storage.write_whole(path, html.render(FILE, views=list(views), statistics=statistics))
    return path


def _spans(tokens: np.ndarray, is_taught: np.ndarray, builder: ExampleBuilder) -> Iterable[Span]:
    tokenizer = builder.tokenizer

    def kind_of(position: int) -> tuple[str, bool]:
        token = int(tokens[position])
        if token == builder.image_token_id:
            return "image", False
        return "text" if tokenizer.is_text(token) else "special", bool(is_taught[position])

    # Neighbours that are alike make one span.
    for (kind, taught), run in itertools.groupby(range(len(tokens)), kind_of):
        ids = [int(tokens[position]) for position in run]
        if kind == "image":
            yield Span(kind, f"{len(ids):,} image tokens", len(ids))
        elif kind == "special":
            yield Span(
                "special taught" if taught else kind, " ".join(map(tokenizer.piece, ids)), len(ids)
            )
        else:
            yield Span("taught" if taught else kind, tokenizer.decode(ids), len(ids))


def _thumbnail(tile: np.ndarray) -> str:
    picture = Image.fromarray(tile)
    # In place, and never enlarged.
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return html.image_uri(picture)
