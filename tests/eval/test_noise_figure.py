"""The picture has the curves that it was given."""

import io

import numpy as np
from PIL import Image

from alignvlm_jax.eval import noise_figure


def found(scores: list[float]) -> dict:
    points = [{"relative_sigma": i, "anls": score, "centred_distance": 0.1 * i} for i, score in enumerate(scores)]
    return {"centred_between_distance": 0.5, "points": points}


def pixels(results: dict) -> np.ndarray:
    image = Image.open(io.BytesIO(noise_figure.picture(results))).convert("RGB")
    assert image.width == noise_figure.INCHES[0] * noise_figure.DPI
    return np.asarray(image, int)


def test_curves_are_told_apart_and_follow_the_scores():
    one, both = pixels({"align": found([0.9, 0.8])}), pixels({"align": found([0.9, 0.8]), "mlp": found([0.9, 0.1])})
    blue, orange = (31, 119, 180), (255, 127, 14)

    def rows(image: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
        """Of the left panel, where curves of this color are."""
        half = image[:, : image.shape[1] // 2]
        return np.nonzero((np.abs(half - color).max(-1) < 8).any(1))[0]

    assert len(rows(one, blue)) and not len(rows(one, orange))
    # The steeper curve covers more rows.
    assert np.ptp(rows(both, orange)) > 2 * np.ptp(rows(one, blue))
