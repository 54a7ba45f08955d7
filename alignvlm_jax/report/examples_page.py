"""One HTML file of training sequences as the model gets them: records and their borders, tiles,
text with the loss mask."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.data.examples import Segment
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.ingest.statistics import Statistics
from alignvlm_jax.pictures import html

FILE = "rows.html"
THUMBNAIL = 220
"""Pixels of a tile's longer side."""


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of tokens: "text" that is read only, "taught" text that the loss is on, "special"
    tokens by their names, or the image tokens of one or several tiles ("slots")."""

    kind: str
    text: str
    count: int


@dataclasses.dataclass(frozen=True)
class ShownSegment:
    """What one record brings to a row. `tiles` are pictures as data URIs."""

    number: int
    name: str
    spans: Sequence[Span]
    tiles: Sequence[str]
    num_tokens: int
    num_taught: int
    loss_weight: float


@dataclasses.dataclass(frozen=True)
class View:
    """A row to be looked at."""

    index: int
    length: int
    num_tile_slots: int
    segments: Sequence[ShownSegment]

    @property
    def packing_efficiency(self) -> float:
        """The fraction of the row's tokens that are no padding."""
        return sum(segment.num_tokens for segment in self.segments) / self.length


def view(
    index: int, parts: Sequence[tuple[str, Segment]], config: Config, tokenizer: Tokenizer
) -> View:
    """Returns row number `index` of a stage to be looked at, made of `parts`, each with its
    record's id."""
    segments = []
    for number, (name, part) in enumerate(parts):
        # The weight at t is of predicting t + 1, and the first token of a record is predicted by
        # none.
        is_taught = np.append(False, part.loss_weights[:-1] > 0)
        segments.append(
            ShownSegment(
                number=number,
                name=name,
                spans=list(_spans(part.tokens, is_taught, config.model.image_token_id, tokenizer)),
                tiles=[_thumbnail(tile) for tile in part.tile_arrays["tiles"]],
                num_tokens=len(part.tokens),
                num_taught=int(is_taught.sum()),
                loss_weight=float(part.loss_weights.sum()),
            )
        )
    return View(index, config.data.seq_len, config.data.max_tiles, segments)


def build(views: Iterable[View], statistics: Statistics, path: Path) -> Path:
    """Writes the page and returns its path."""
    storage.write_whole(path, html.render(FILE, views=list(views), statistics=statistics))
    return path


def _spans(
    tokens: np.ndarray, is_taught: np.ndarray, image_id: int, tokenizer: Tokenizer
) -> Iterable[Span]:
    def kind_of(position: int) -> tuple[str, bool]:
        token = int(tokens[position])
        if token == image_id:
            return "slots", False
        return "text" if tokenizer.is_text(token) else "special", bool(is_taught[position])

    for (kind, taught), run in itertools.groupby(range(len(tokens)), kind_of):
        ids = [int(tokens[position]) for position in run]
        if kind == "slots":
            yield Span(kind, f"{len(ids):,} image tokens", len(ids))
        elif kind == "special":
            yield Span(
                "special taught" if taught else kind, " ".join(map(tokenizer.piece, ids)), len(ids)
            )
        else:
            yield Span("taught" if taught else kind, tokenizer.decode(ids), len(ids))


def _thumbnail(tile: np.ndarray) -> str:
    picture = Image.fromarray(tile)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return html.image_uri(picture)
