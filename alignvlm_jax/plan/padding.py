"""How much of a stage's sequences is padding, where its prepared data is at hand: what is computed
of it is no use, and MFU counts it all the same."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import DataConfig, ModelConfig
from alignvlm_jax.data import filesystem, index, lengths, mixture, packing
from alignvlm_jax.data.lengths import Limits
from alignvlm_jax.data.packing import Sizes
from alignvlm_jax.errors import UserError

MAX_PLANNED = 100_000
"""Records of a folder from which packing is estimated: with a million a plan takes seconds."""
OF_TILES = ("vision", "connector")
"""Components that compute tiles; the others compute tokens."""


class Used(NamedTuple):
    """Fractions of the tokens and of the tiles of sequences that are no padding."""

    tokens: float
    tiles: float

    def of_flops(self, flops: Mapping[str, float]) -> float:
        """Returns the fraction of FLOPs, given by component, that is spent on what is no padding;
        attention is taken as if it grew with the tokens, and not with their square."""
        useful = sum(
            value * (self.tiles if part in OF_TILES else self.tokens)
            for part, value in flops.items()
        )
        return useful / sum(flops.values())


def used(data: DataConfig, model: ModelConfig) -> Used | None:
    """Returns what is used of a stage's sequences, by the indexes of its folders on this machine;
    None where one is not there, or no records of the stage are in them."""
    tokens = tiles = num_sequences = 0.0
    limits = Limits.of(data, model.vision, model.tokens_per_tile)
    tasks, fractions = mixture.task_fractions(data.tasks)
    for folder in data.folders:
        # Elsewhere every folder may be in a bucket: a plan asks no network.
        if filesystem.is_remote(folder) or not os.path.isdir(folder):
            return None
        try:
            measured = lengths.measure(index.load(folder, data.split), tasks, limits)
        except UserError:
            return None
        for fraction, found in zip(fractions, measured.tokens, strict=True):
            usable = np.flatnonzero(found)[:MAX_PLANNED]
            its_tiles = measured.tiles[usable]
            tokens += fraction * found[usable].sum()
            tiles += fraction * its_tiles.sum()
            num_sequences += fraction * _num_sequences(found[usable], its_tiles, data)
    if not num_sequences:
        return None
    return Used(
        float(tokens / (num_sequences * data.seq_len)),
        float(tiles / (num_sequences * data.max_tiles)),
    )


def _num_sequences(tokens: np.ndarray, tiles: np.ndarray, data: DataConfig) -> int:
    """The sequences that records make which have so many tokens and tiles."""
    if data.packing == "none":
        return len(tokens)
    pairs, counts = np.unique(np.stack([tokens, tiles]), axis=1, return_counts=True)
    sizes = Sizes(pairs[0].tolist(), pairs[1].tolist(), counts.tolist())
    return sum(rows.count for rows in packing.fit(sizes, data.seq_len, data.max_tiles))
