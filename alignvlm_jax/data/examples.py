"""Records to one row of a batch: image tokens, chat tokens, loss weights, tiles and patch
labels."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from alignvlm_jax.config import Config
from alignvlm_jax.data import chat, images, labels
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError

TRANSCRIBE_QUESTION = "Read the page."
PackedSequence = dict[str, np.ndarray]
"""The arrays of `record.Batch` without the axis B."""


def transcription(record: Record) -> str:
    """Returns the words of a record, those of a drawn line on one line; "" where it does not know
    them."""
    return "\n".join(" ".join(word.text for word in line) for page in record.lines for line in page)


def _transcribe(record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
    text = transcription(record)
    return [(TRANSCRIBE_QUESTION, text)] if text else []


def _answer(record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
    turns = [record.turns[i] for i in rng.permutation(len(record.turns))]
    return [(turn.question, turn.answers[0]) for turn in turns if turn.answers]


def _answer_and_transcribe(record: Record, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Both, in either order: more to learn from each page.

    What comes second can look back at what came first.
    """
    answers = _answer(record, rng)
    text = _transcribe(record, rng)
    return answers + text if rng.random() < 0.5 else text + answers


TASKS: dict[str, Callable[[Record, np.random.Generator], list[tuple[str, str]]]] = {
    "transcribe": _transcribe,
    "answer": _answer,
    "answer_and_transcribe": _answer_and_transcribe,
}
"""What a row asks of a record, by the names of `data.tasks`: (question, answer) turns, possibly
none."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a record brings into a row: n tokens, the image tokens among them, and t tiles."""

    tokens: np.ndarray  # int32 [n]
    loss_weights: np.ndarray  # float32 [n], of predicting the next token
    tile_arrays: PackedSequence  # "tiles" and the patch labels of `record.Batch`, each [t, ...]


def build_segment(
    record: Record, task: str, rng: np.random.Generator, config: Config, tokenizer: Tokenizer
) -> Segment:
    """Builds a record's part of a training sequence.

    Turns that do not fit `data.seq_len` are left out; a packed sequence cuts the answer of
    `transcribe` there instead. Where no answer fits, or the record lacks what the task needs, loss
    weights are 0 throughout; a packed sequence has no place for that.

    Raises:
      UserError: an unreadable image, more images than the record may have tiles, or no answer for a
        packed sequence.
    """
    data = config.data
    pages = _tile_pages(record, config)
    turns = TASKS[task](record, rng)
    num_image_tokens = _num_image_tokens(pages, config.tokens_per_tile)
    image_id = config.model.image_token_id
    is_cut = data.packing == "offline" and task == "transcribe"
    tokens, is_answer = chat.encode_chat(
        tokenizer, turns, num_image_tokens, image_id, data.seq_len, is_cut
    )
    if data.packing == "offline" and not is_answer.any():
        raise UserError(
            f"record {record.id} has no answer that fits config.data.seq_len {data.seq_len}"
        )
    loss_weights = np.zeros(len(tokens), np.float32)
    loss_weights[:-1] = is_answer[1:]
    if data.loss_normalisation == "record" and is_answer.any():
        loss_weights /= loss_weights.sum()
    return Segment(
        tokens,
        loss_weights,
        {"tiles": _stack_tiles(pages, config)} | _labels(record, pages, config, tokenizer),
    )


def join(segments: Sequence[Segment], config: Config, tokenizer: Tokenizer) -> PackedSequence:
    """Returns the row of parts that fit it together: a segment each, one after another, their tiles
    likewise."""
    vision = config.model.vision
    data = config.data
    max_tiles = data.max_tiles
    labels_shape = (vision.num_patches, data.max_patch_labels)
    row = _text_arrays(
        [(segment.tokens, segment.loss_weights) for segment in segments], data.seq_len, tokenizer
    ) | {
        "tiles": np.zeros((max_tiles, vision.tile_height, vision.tile_width, 3), np.uint8),
        "patch_label_ids": np.full((max_tiles, *labels_shape), tokenizer.space_id, np.int32),
        "patch_label_weights": np.zeros((max_tiles, *labels_shape), np.float32),
        "patch_loss_weights": np.zeros((max_tiles, vision.num_patches), np.float32),
    }
    start = 0
    for segment in segments:
        end = start + len(segment.tile_arrays["tiles"])
        for name, array in segment.tile_arrays.items():
            row[name][start:end] = array
        start = end
    return row


def build_sequence(
    record: Record, task: str, rng: np.random.Generator, config: Config, tokenizer: Tokenizer
) -> PackedSequence:
    """Returns the training sequence of one record; see `build_part`."""
    return join([build_segment(record, task, rng, config, tokenizer)], config, tokenizer)


def build_prompt(
    page: Record | Image.Image | None, question: str, config: Config, tokenizer: Tokenizer
) -> PackedSequence:
    """Builds the row of a question to be answered: it ends where the answer begins, and has no loss
    and no patch labels. Without a page it has no tiles either, and of a record without images they
    are all unused; a page is read from pixels, whatever the stage was trained on.

    Raises:
      UserError: the prompt is longer than `data.seq_len`.
    """
    data = config.data
    vision = config.model.vision
    if page is None:
        pages = []
    elif isinstance(page, Image.Image):
        pages = [
            images.tile_image(
                page.convert("RGB"), vision, data.tiles_of_a_record, data.use_overview
            )
        ]
    else:
        pages = _tile_pages(page, config)
    num_image_tokens = _num_image_tokens(pages, config.model.tokens_per_tile)
    tokens = chat.encode_prompt(tokenizer, question, num_image_tokens, config.model.image_token_id)
    if len(tokens) > data.seq_len:
        raise UserError(
            f"the prompt has {len(tokens)} tokens ({num_image_tokens} of the image) and "
            f"config.data.seq_len is {data.seq_len}; shorten the question by "
            f"{len(tokens) - data.seq_len} tokens"
        )
    row = _text_arrays([(tokens, np.zeros(len(tokens), np.float32))], data.seq_len, tokenizer)
    if page is None:
        return row
    tiles = _stack_tiles(pages, config)
    unused = np.zeros((data.tiles_of_a_record - len(tiles), *tiles.shape[1:]), np.uint8)
    return row | {"tiles": np.concatenate([tiles, unused])}


def build_text(tokens: np.ndarray, length: int, tokenizer: Tokenizer) -> PackedSequence:
    """Builds the row of at most `length` tokens of plain text, without tiles: every token but the
    first is to be predicted, with a loss weight of 1."""
    loss_weights = np.ones(len(tokens), np.float32)
    loss_weights[-1:] = 0
    return _text_arrays([(tokens, loss_weights)], length, tokenizer)


def trim_prompts(prompts: Sequence[PackedSequence], config: Config) -> list[PackedSequence]:
    """Returns prompts, still of one shape, without the tiles that none of them uses and
    without the padding that all have: with room for nine tiles, one should not cost nine."""
    length, num_tiles = extent(prompts, config)
    return [trim(row, length, num_tiles) for row in prompts]


def extent(
    prompts: Sequence[PackedSequence], config: Config, multiple: int = 64
) -> tuple[int, int] | None:
    """Returns how many tokens, rounded up to a `multiple`, and tiles the largest of some prompts
    have; None of none."""
    if not prompts:
        return None
    length = -(-max(int(row["segment_ids"].sum()) for row in prompts) // multiple) * multiple
    num_image_tokens = max(
        int((row["tokens"] == config.model.image_token_id).sum()) for row in prompts
    )
    return length, num_image_tokens // config.model.tokens_per_tile


def trim(prompt: PackedSequence, length: int, num_tiles: int) -> PackedSequence:
    """Returns a prompt of at most so many tokens and tiles."""
    ends = {"tiles": num_tiles}
    return {name: array[: ends.get(name, length)] for name, array in prompt.items()}


def _tile_pages(record: Record, config: Config) -> list[Tiles]:
    """The tiles of a record's images, which share those that it may have evenly."""
    data = config.data
    most = data.tiles_of_a_record
    if len(record.images) > most:
        field = "record_tiles" if data.record_tiles else "max_tiles"
        raise UserError(
            f"record {record.id} has {len(record.images)} images; config.data.{field} is {most}"
        )
    return [
        images.tile_image(
            images.decode_image(image, f"{i} of record {record.id}"),
            config.model.vision,
            most // len(record.images),
            data.use_overview,
        )
        for i, image in enumerate(record.images)
    ]


def _num_image_tokens(pages: list[Tiles], tokens_per_tile: int) -> int:
    return sum(len(page.pixels) for page in pages) * tokens_per_tile


def _text_arrays(
    segments: Sequence[tuple[np.ndarray, np.ndarray]], length: int, tokenizer: Tokenizer
) -> PackedSequence:
    """The arrays of segments, each its tokens and their loss weights.

    No position predicts the next segment.
    """
    row = {
        "tokens": np.full(length, tokenizer.pad_id, np.int32),
        "targets": np.full(length, tokenizer.pad_id, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
    }
    start = 0
    for number, (tokens, loss_weights) in enumerate(segments, start=1):
        end = start + len(tokens)
        row["tokens"][start:end] = tokens
        row["targets"][start : end - 1] = tokens[1:]
        row["loss_weights"][start:end] = loss_weights
        row["positions"][start:end] = np.arange(len(tokens))
        row["segment_ids"][start:end] = number
        start = end
    return row


def _stack_tiles(pages: list[Tiles], config: Config) -> np.ndarray:
    """All pages' tiles, uint8 [t, Y, X, C]."""
    vision = config.model.vision
    none = np.zeros((0, vision.tile_height, vision.tile_width, 3), np.uint8)
    return np.concatenate([none, *(page.pixels for page in pages)])


def _labels(
    record: Record, pages: list[Tiles], config: Config, tokenizer: Tokenizer
) -> PackedSequence:
    """The tiles' labels.

    Where a record does not know its words, or is not labelled, they carry no loss.
    """
    vision = config.model.vision
    k = config.data.max_patch_labels
    is_labelled = zlib.crc32(record.id.encode()) < config.data.labelled_fraction * 2**32
    ids = [np.zeros((0, vision.num_patches, k), np.int32)]
    weights = [np.zeros((0, vision.num_patches, k), np.float32)]
    loss_weights = [np.zeros((0, vision.num_patches), np.float32)]
    for index, page in enumerate(pages):
        lines = record.lines[index] if record.lines else ()
        blank_weight = config.data.blank_weight if record.lines else 0.0
        of_page = labels.patch_labels(lines, page, tokenizer, vision, k, blank_weight)
        for found, array in zip((ids, weights, loss_weights), of_page, strict=True):
            found.append(array)
    return {
        "patch_label_ids": np.concatenate(ids),
        "patch_label_weights": np.concatenate(weights),
        "patch_loss_weights": np.concatenate(loss_weights) * np.float32(is_labelled),
    }
