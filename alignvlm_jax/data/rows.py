"""A record to one row of a batch: image slots, chat tokens, loss weights, tiles and patch labels."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, images, labels
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.schema import Record
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError

TRANSCRIBE_QUESTION = "Read the page."
Row = dict[str, np.ndarray]
"""The arrays of `schema.Batch` without the axis B."""


def _transcribe(record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
    text = "\n".join(" ".join(word.text for word in line) for page in record.lines for line in page)
    return [(TRANSCRIBE_QUESTION, text)] if text else []


def _answer(record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
    turns = [record.turns[i] for i in rng.permutation(len(record.turns))]
    return [(turn.question, turn.answers[0]) for turn in turns]


def _answer_and_transcribe(record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Both, in either order: more to learn from each page. What comes second can look back at what came first."""
    answers, text = _answer(record, rng), _transcribe(record, rng)
    return answers + text if rng.random() < 0.5 else text + answers


TASKS: dict[str, Callable[[Record, np.random.Generator], list[tuple[str, str]]]] = {
    "transcribe": _transcribe,
    "answer": _answer,
    "answer_and_transcribe": _answer_and_transcribe,
}
"""What a row asks of its record, by the names of `data.tasks`: (question, answer) turns, possibly none."""


def build_row(record: Record, task: str, rng: np.random.Generator, config: Config, tokenizer: Tokenizer) -> Row:
    """Builds a training row.

    A row whose answers do not fit `data.row_length`, or whose record lacks what the task needs, has loss weights of 0
    throughout; the pipeline counts these.

    Raises:
      UserError: an unreadable image, or more images than tile slots.
    """
    pages = _tile_pages(record, config)
    turns = TASKS[task](record, rng)
    num_slots, image_id = _num_slots(pages, config), config.model.image_token_id
    tokens, is_answer = chat.encode_chat(tokenizer, turns, num_slots, image_id, config.data.row_length)
    text = _text_arrays(tokens, is_answer, config, tokenizer)
    return text | {"tiles": _tiles(pages, config)} | _label_arrays(record, pages, config, tokenizer)


def build_prompt(page: Record | Image.Image | None, question: str, config: Config, tokenizer: Tokenizer) -> Row:
    """Builds the row of a question to be answered: it ends where the answer begins, and has no loss and no patch
    labels. Without a page it has no tiles either.

    Raises:
      UserError: the prompt is longer than `data.row_length`.
    """
    if page is None:
        pages = []
    elif isinstance(page, Image.Image):
        pages = [
            images.tile_image(page.convert("RGB"), config.model.vision, config.data.max_tiles, config.data.use_overview)
        ]
    else:
        pages = _tile_pages(page, config)
    num_slots = _num_slots(pages, config)
    tokens = chat.encode_prompt(tokenizer, question, num_slots, config.model.image_token_id)
    if len(tokens) > config.data.row_length:
        raise UserError(
            f"the prompt has {len(tokens)} tokens ({num_slots} of the image) and config.data.row_length is "
            f"{config.data.row_length}; shorten the question by {len(tokens) - config.data.row_length} tokens"
        )
    row = _text_arrays(tokens, np.zeros(len(tokens), bool), config, tokenizer)
    return row | {"tiles": _tiles(pages, config)} if pages else row


def trim_prompt(row: Row, config: Config, multiple: int = 64) -> Row:
    """Returns a prompt without the tile slots that it does not use and without its padding beyond a `multiple`: with
    room for nine tiles, one should not cost nine."""
    length = -(-int(row["segment_ids"].sum()) // multiple) * multiple
    trimmed = {name: array if name == "tiles" else array[:length] for name, array in row.items()}
    if "tiles" in row:
        num_tiles = (row["tokens"] == config.model.image_token_id).sum() // config.model.slots_per_tile
        trimmed["tiles"] = row["tiles"][:num_tiles]
    return trimmed


def _tile_pages(record: Record, config: Config) -> list[Tiles]:
    """The tiles of a record's images, which share `data.max_tiles` evenly."""
    data = config.data
    if len(record.images) > data.max_tiles:
        raise UserError(
            f"record {record.id} has {len(record.images)} images; config.data.max_tiles is {data.max_tiles}"
        )
    return [
        images.tile_image(
            images.decode_image(image, f"{i} of record {record.id}"),
            config.model.vision,
            data.max_tiles // len(record.images),
            data.use_overview,
        )
        for i, image in enumerate(record.images)
    ]


def _num_slots(pages: list[Tiles], config: Config) -> int:
    return sum(len(page.pixels) for page in pages) * config.model.slots_per_tile


def _text_arrays(tokens: np.ndarray, is_answer: np.ndarray, config: Config, tokenizer: Tokenizer) -> Row:
    length = config.data.row_length
    used = len(tokens)
    row_tokens = np.full(length, tokenizer.pad_id, np.int32)
    row_tokens[:used] = tokens
    loss_weights = np.zeros(length, np.float32)
    loss_weights[: used - 1] = is_answer[1:]
    in_use = np.arange(length) < used
    return {
        "tokens": row_tokens,
        "targets": np.append(row_tokens[1:], np.int32(tokenizer.pad_id)),
        "loss_weights": loss_weights,
        "positions": np.arange(length, dtype=np.int32) * in_use,
        "segment_ids": in_use.astype(np.int32),
    }


def _tiles(pages: list[Tiles], config: Config) -> np.ndarray:
    """All pages' tiles, padded to `data.max_tiles`."""
    vision = config.model.vision
    tiles = np.zeros((config.data.max_tiles, vision.tile_height, vision.tile_width, 3), np.uint8)
    for slot, tile in enumerate(tile for page in pages for tile in page.pixels):
        tiles[slot] = tile
    return tiles


def _label_arrays(record: Record, pages: list[Tiles], config: Config, tokenizer: Tokenizer) -> Row:
    """The tiles' labels, padded like them. Where a record does not know its words they carry no loss."""
    vision, data = config.model.vision, config.data
    slots, patches, k = data.max_tiles, vision.num_patches, data.max_patch_labels
    ids = np.full((slots, patches, k), tokenizer.space_id, np.int32)
    weights = np.zeros((slots, patches, k), np.float32)
    loss_weights = np.zeros((slots, patches), np.float32)
    start = 0
    for index, page in enumerate(pages):
        used = slice(start, start := start + len(page.pixels))
        lines = record.lines[index] if record.lines else ()
        ids[used], weights[used], loss_weights[used] = labels.patch_labels(
            lines, page, tokenizer, vision, k, data.blank_weight if record.lines else 0.0
        )
    return {"patch_label_ids": ids, "patch_label_weights": weights, "patch_loss_weights": loss_weights}
