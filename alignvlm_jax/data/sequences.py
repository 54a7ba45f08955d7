"""Packed sequences as arrays: those of their text, and how a prompt is cut to a shape."""

from collections.abc import Sequence

import numpy as np

from alignvlm_jax.data.tokenizers.base import Tokenizer

PackedSequence = dict[str, np.ndarray]
"""The arrays of `record.Batch` without the axis B."""


def build_text(tokens: np.ndarray, length: int, tokenizer: Tokenizer) -> PackedSequence:
    """Returns the sequence of at most `length` tokens of plain text, without tiles: every token but
    the first is to be predicted, with a loss weight of 1."""
    loss_weights = np.ones(len(tokens), np.float32)
    loss_weights[-1:] = 0
    return text_arrays([(tokens, loss_weights)], length, tokenizer)


def prompt_length(prompt: PackedSequence) -> int:
    """Returns the tokens of a prompt, those of images included, without padding."""
    # A prompt is segment 1 throughout: the sum is its length.
    return int(prompt["segment_ids"].sum())


def trim(prompt: PackedSequence, length: int, num_tiles: int) -> PackedSequence:
    """Returns a prompt of at most so many tokens and tiles."""
    ends = {"tiles": num_tiles, "kept_patches": num_tiles}
    return {name: array[: ends.get(name, length)] for name, array in prompt.items()}


def normalised(loss_weights: np.ndarray, unit: str) -> np.ndarray:
    """Loss weights float32 [n], whose sum is 1 over each "answer", or over the "record"."""
    if unit == "record":
        return loss_weights / loss_weights.sum()
    # Answers are runs of weights above 0: a question stands between any two.
    starts = np.diff(loss_weights, prepend=np.float32(0)) > 0
    numbers = np.cumsum(starts)
    sizes = np.bincount(numbers, weights=loss_weights)
    return loss_weights / np.maximum(sizes[numbers], 1).astype(np.float32)


def text_arrays(
    segments: Sequence[tuple[np.ndarray, np.ndarray]], length: int, tokenizer: Tokenizer
) -> PackedSequence:
    """The arrays [length] of segments, each its tokens and their loss weights.

    No position predicts the next segment.
    """
    arrays = {
        "tokens": np.full(length, tokenizer.pad_id, np.int32),
        "targets": np.full(length, tokenizer.pad_id, np.int32),
        "loss_weights": np.zeros(length, np.float32),
        "positions": np.zeros(length, np.int32),
        "segment_ids": np.zeros(length, np.int32),
    }
    start = 0
    # Numbered from 1: segment 0 is the padding, which attention must tell from text.
    for number, (tokens, loss_weights) in enumerate(segments, start=1):
        end = start + len(tokens)
        arrays["tokens"][start:end] = tokens
        # The last position of a segment predicts nothing: its target stays padding, its weight is
        # 0.
        arrays["targets"][start : end - 1] = tokens[1:]
        arrays["loss_weights"][start:end] = loss_weights
        # From 0 in each segment, as if it had the sequence to itself.
        arrays["positions"][start:end] = np.arange(len(tokens))
        arrays["segment_ids"][start:end] = number
        start = end
    return arrays
