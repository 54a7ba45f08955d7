"""The picture follows means, entropies and scores; odd words do not harm it."""

import copy

import numpy as np
import pytest

from alignvlm_jax.analysis import vocabulary
from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import area, decode

FOUND = {
    "num_patches": 10,
    "entropy_histogram": {"edges": [0.0, 1.0, 2.0, 3.0], "patches": [2, 8, 0]},
    "mean_perplexity": 4.0,
    "top_words": [{"token": token, "mean": 0.5} for token in ("␣", "$x$", "中", "_{")],
    "pruning": [
        {"words": name, "num_words": 8, "anls": 0.5} for name in ("all", "mean", "highest")
    ],
}
BLUE = plotting.COLORS[0]


def picture(change=lambda found: None) -> np.ndarray:
    found = copy.deepcopy(FOUND)
    change(found)
    return decode(vocabulary.picture(found))


def lower_mean(found) -> None:
    found["top_words"][1]["mean"] = 0.1


def sharper(found) -> None:
    found["entropy_histogram"]["patches"] = [10, 0, 0]


def worse(found) -> None:
    found["pruning"][1]["anls"] = 0.1


@pytest.mark.parametrize("change", [lower_mean, sharper, worse])
def test_the_picture_follows_the_numbers(change):
    before = picture()
    after = picture(change)
    assert area(after, BLUE) < area(before, BLUE)
