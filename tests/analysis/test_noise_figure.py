"""The picture has the curves that it was given."""

import numpy as np

from alignvlm_jax.analysis import noise
from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import decode, has


def found(scores: list[float]) -> dict:
    points = [
        {"relative_sigma": i, "anls": score, "centred_distance": 0.1 * i}
        for i, score in enumerate(scores)
    ]
    return {"centred_between_distance": 0.5, "points": points}


def pixels(results: dict) -> np.ndarray:
    return decode(noise.picture(results))


def rows(image: np.ndarray, color: str) -> np.ndarray:
    """Where curves of this color are."""
    return np.nonzero(has(image, color).any(1))[0]


def test_curves_are_told_apart_and_follow_the_scores():
    one = pixels({"align": found([0.9, 0.8])})
    both = pixels({"align": found([0.9, 0.8]), "mlp": found([0.9, 0.1])})
    assert one.shape[1] == 2 * noise.INCHES[0] * plotting.DPI
    left, left_of_both = (image[:, : image.shape[1] // 2] for image in (one, both))
    blue, orange = plotting.COLORS[:2]
    assert len(rows(left, blue)) and not len(rows(left, orange))
    # The steeper curve covers more rows.
    assert np.ptp(rows(left_of_both, orange)) > 2 * np.ptp(rows(left, blue))


def test_without_distances_there_is_one_panel():
    points = [{"relative_shift": i, "anls": score} for i, score in enumerate((0.9, 0.1))]
    image = pixels({"align": {"kind": "layout", "patch_pixels": 8.0, "points": points}})
    assert image.shape[1] == noise.INCHES[0] * plotting.DPI
    assert np.ptp(rows(image, plotting.COLORS[0])) > image.shape[0] / 2
