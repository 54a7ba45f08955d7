"""One HTML file of records as they were prepared: their pages with word boxes, patch labels and
answers drawn over them."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from alignvlm_jax import storage
from alignvlm_jax.config import VisionConfig
from alignvlm_jax.data import images, labels
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.errors import counted
from alignvlm_jax.pictures import html

FILE = "records.html"
MAX_SIDE = 1600
"""The most pixels of a page's longer side; larger pages are scaled down."""
AROUND = ".,;:!?()[]\"'"
"""What may stand around a word of an answer on the page."""


@dataclasses.dataclass(frozen=True)
class ShownTurn:
    """A question, its accepted answers, and whether one of them stands on a page word for word."""

    question: str
    answers: Sequence[str]
    is_found: bool


@dataclasses.dataclass(frozen=True)
class ShownPage:
    """A page of a record: its picture as a data URI, its size, and `data`, which the script of the
    page draws over it."""

    picture: str
    width: int
    height: int
    num_words: int
    data: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class View:
    """A record to be looked at.

    Attributes:
      record: with its id and source.
      turns: its questions.
      pages: its images.
      fractions: of the patches on its pages, by what the patch-token loss teaches them.
      padding: fraction of its patches that lie on no page.
    """

    record: Record
    turns: Sequence[ShownTurn]
    pages: Sequence[ShownPage]
    fractions: dict[str, float]
    padding: float

    @property
    def has_words(self) -> bool:
        """Whether the words of its pages are known, among which an answer could stand."""
        return any(page.num_words for page in self.pages)

    def __str__(self) -> str:
        words = counted(sum(page.num_words for page in self.pages), "word")
        found = sum(turn.is_found for turn in self.turns)
        questions = counted(len(self.turns), "question")
        placed = f", {found} answered by words of the page" if self.has_words else ""
        return (
            f"{self.record.id}: {counted(len(self.pages), 'image')}, {words}, {questions}{placed}"
        )


def has_text(record: Record, text: str) -> bool:
    """Whether a record has a text, in capitals or not, in its id, source, turns or words."""
    words = " ".join(word.text for page in record.lines for line in page for word in line)
    turns = [part for turn in record.turns for part in (turn.question, *turn.answers)]
    return text.casefold() in "\n".join([record.id, record.source, words, *turns]).casefold()


def view(record: Record, builder: ExampleBuilder) -> View:
    """Returns a record to be looked at, as the examples of a builder have it.

    Raises:
      UserError: an image cannot be read, or there are more than the record may have tiles.
    """
    # By the code of training, not by another way to the same: what is drawn is what is taught.
    tiles = builder.tile_pages(record)
    arrays = builder.patch_labels(record, tiles)
    ends = np.cumsum([len(page.pixels) for page in tiles])[:-1]
    # [t, P, ...] of all tiles, cut into those of each page.
    by_page = [np.split(array, ends) for array in arrays.values()] if tiles else []
    pages = []
    kinds = []
    num_patches = 0
    for number, page in enumerate(tiles):
        ids, weights, loss = (array[number] for array in by_page)
        boxes, is_shown = labels.patch_boxes(page, builder.vision)
        kinds.append(_kinds(ids, weights, loss, builder.tokenizer.space_id)[is_shown])
        num_patches += is_shown.size
        shown = _patches(boxes, is_shown, ids, weights, loss, builder, page)
        pages.append(_page(record, number, shown))
    all_kinds = np.concatenate([np.zeros(0, "<U8"), *kinds])
    names, counts = np.unique(all_kinds, return_counts=True)
    found = {turn for page in pages for turn, _ in page.data["answers"]}
    return View(
        record,
        [
            ShownTurn(turn.question, turn.answers, number in found)
            for number, turn in enumerate(record.turns, start=1)
        ],
        pages,
        {str(name): count / len(all_kinds) for name, count in zip(names, counts, strict=True)},
        1 - len(all_kinds) / num_patches if num_patches else 0.0,
    )


class Heading(NamedTuple):
    """What the page says of its records: where they are from, and for which stage they are
    labelled."""

    folders: str
    split: str
    stage: str
    has_labels: bool


def build(views: Iterable[View], heading: Heading, vision: VisionConfig, path: Path) -> Path:
    """Writes the page of records that are seen through tiles of a size, and returns its path."""
    page = html.render(FILE, views=list(views), heading=heading, vision=vision)
    storage.write_whole(path, page)
    return path


def _kinds(
    ids: np.ndarray, weights: np.ndarray, loss_weights: np.ndarray, space_id: int
) -> np.ndarray:
    """Returns what each patch is taught, [n, P]: "text", "blank", or "nothing"."""
    # Where a line ends there is more space than text: a blank patch has nothing but space.
    is_blank = ((ids == space_id) | (weights == 0)).all(-1)
    return np.where(loss_weights == 0, "nothing", np.where(is_blank, "blank", "text"))


def _patches(
    boxes: np.ndarray,
    is_shown: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    loss_weights: np.ndarray,
    builder: ExampleBuilder,
    page: Tiles,
) -> list[list[Any]]:
    """Returns the patches of a page that are not blank, each its box, its loss weight, whether it
    is of the overview, and its tokens with their weights."""
    kinds = _kinds(ids, weights, loss_weights, builder.tokenizer.space_id)
    # A record without labels has no loss anywhere, which needs no drawing.
    if not loss_weights.any():
        return []
    has_overview = builder.data.use_overview and len(page.pixels) > 1
    found = []
    for tile, patch in np.argwhere(is_shown & (kinds != "blank")).tolist():
        tokens = [
            [builder.tokenizer.piece(int(token)), round(float(weight), 2)]
            for token, weight in zip(ids[tile, patch], weights[tile, patch], strict=True)
            if weight > 0
        ]
        box = boxes[tile, patch].round(1).tolist()
        is_overview = has_overview and tile == 0
        found.append([box, round(float(loss_weights[tile, patch]), 2), int(is_overview), tokens])
    return found


def _page(record: Record, number: int, patches: list[list[Any]]) -> ShownPage:
    image = images.decode_image(record.images[number], f"{number} of record {record.id}")
    width, height = image.size
    lines = record.lines[number] if record.lines else ()
    words = [
        [list(word.box), word.text, place, word.confidence]
        for place, line in enumerate(lines, start=1)
        for word in line
    ]
    # As scores compare answers: a page may write "Total:" where the answer is "total".
    texts = [word.text.casefold().strip(AROUND) for line in lines for word in line]
    answers = [
        [number_of_turn, place]
        for number_of_turn, turn in enumerate(record.turns, start=1)
        for place in _find(texts, turn)
    ]
    # Boxes stay in pixels of the page itself: the drawing over it is scaled by the browser.
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    data = {"words": words, "patches": patches, "answers": answers}
    return ShownPage(html.image_uri(image), width, height, len(words), data)


def _find(texts: Sequence[str], turn: Turn) -> list[int]:
    """Returns which words of a page spell the first answer of a turn that stands there."""
    for answer in turn.answers:
        wanted = [word.strip(AROUND) for word in answer.casefold().split()]
        if not wanted:
            continue
        starts = [
            start
            for start in range(len(texts) - len(wanted) + 1)
            if list(texts[start : start + len(wanted)]) == wanted
        ]
        if starts:
            return [start + i for start in starts for i in range(len(wanted))]
    return []
