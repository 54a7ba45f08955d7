"""How much of a stage's sequences is padding, where its prepared data is at hand: what is computed
of it is no use, and MFU counts it all the same."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import DataConfig, ModelConfig
from alignvlm_jax.data import filesystem, index, lengths
from alignvlm_jax.data.lengths import Lengths, Limits
from alignvlm_jax.data.mixture import Mixture, task_fractions
from alignvlm_jax.errors import UserError

MAX_PLANNED = 100_000
"""Records from which packing is estimated, about: with a million a plan takes seconds."""
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


def used(data: DataConfig, model: ModelConfig, tokens_per_tile: int) -> Used | None:
    """Returns what is used of the sequences of a stage's first epoch, planned as training does by
    the indexes of its folders on this machine; None where one is not there, no records of the
    stage are in them, or no index counts its tiles, or its image tokens. `tokens_per_tile` is that
    of training sequences."""
    # How many patches are blank is known of pixels alone; letters of texts are not counted.
    if data.blank_contrast or data.text_unit == "letter":
        return None
    # Elsewhere every folder may be in a bucket: a plan asks no network.
    if any(filesystem.is_remote(folder) or not os.path.isdir(folder) for folder in data.folders):
        return None
    tasks, _ = task_fractions(data.tasks)
    try:
        limits = Limits.of(data, model.vision, tokens_per_tile)
        indexes = [index.load(folder, data.split) for folder in data.folders]
        # Every n-th record of all folders, so that each keeps its fraction.
        step = max(math.ceil(sum(map(len, indexes)) / MAX_PLANNED), 1)
        measured = [lengths.measure(one, tasks, limits) for one in indexes]
        tokens = [one.tokens[:, ::step] for one in measured]
        tiles = [one.tiles[::step] for one in measured]
        known = Lengths(np.concatenate(tokens, axis=1), np.concatenate(tiles))
        mixture = Mixture(_capped(data, step), [len(one) for one in tiles], known, seed=(0,))
    except UserError:
        return None
    epoch = mixture.epoch(0, 0)
    num_sequences = epoch.end
    if data.packing == "none":
        num_sequences = math.ceil(len(epoch.records) / data.records_per_sequence)
    return Used(
        float(epoch.tokens.sum() / (num_sequences * data.seq_len)),
        mixture.count_tiles(epoch.records) / (num_sequences * data.max_tiles),
    )


def _capped(data: DataConfig, step: int) -> DataConfig:
    """The data with caps of the sources for every `step`-th of their records."""
    sources = {
        name: dataclasses.replace(source, cap=math.ceil(source.cap / step))
        for name, source in data.sources.items()
    }
    return dataclasses.replace(data, sources=sources)
