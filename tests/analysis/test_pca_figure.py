"""Chosen words are highlighted, in the plane and beside the controls."""

import numpy as np

from alignvlm_jax.analysis import pca
from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import area, decode, has


def picture(nearest: float | None) -> np.ndarray:
    every = np.random.default_rng(0).normal(size=(40, 2))
    sets = {
        name: {"explained": 0.5, "nearest": nearest}
        for name in ("chosen", "random", "most frequent")
    }
    return decode(
        pca.picture(
            {
                "num_words": 40,
                "num_chosen": 10,
                "shares": [0.5, 0.1, 0.05],
                "sets": sets,
                "points": {"all": every.tolist(), "chosen": every[:10].tolist()},
            }
        )
    )


def test_chosen_and_controls():
    image = picture(0.5)
    bars = image[:, image.shape[1] * 6 // 10 :]
    assert area(bars, plotting.QUIET) > 1.9 * area(bars, plotting.COLORS[0]) > 0
    assert has(image[:, : image.shape[1] // 2], plotting.QUIET).any()


def test_where_no_word_is_left_there_are_no_distances():
    with_distances = picture(0.5)
    without = picture(None)
    assert area(without, plotting.COLORS[0]) < 0.7 * area(with_distances, plotting.COLORS[0])
