"""Pictures are the same each time, and words in them can be read."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import area, decode, has


def draw(figure: Figure) -> None:
    plotting.bars(
        figure.add_subplot(), ["one", "$two$"], [1.0, 3.0], ["1", "3"], plotting.COLORS[:2]
    )


def test_bars_are_as_long_as_their_values():
    png = plotting.png((4, 2), draw)
    assert png == plotting.png((4, 2), draw)
    image = decode(png)
    assert image.shape[:2] == (2 * plotting.DPI, 4 * plotting.DPI)
    assert (image[0, 0] == 255).all()
    one, two = (area(image, color) for color in plotting.COLORS[:2])
    assert two / one == pytest.approx(3, rel=0.05)
    first, second = (np.nonzero(has(image, color))[0] for color in plotting.COLORS[:2])
    assert first.max() < second.min()


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("␣total", "␣total"),
        ("⏎", "⏎"),
        ("a\u4e2d", "a⟨4E2D⟩"),
        ("-" * 40, "-" * 19 + "…"),
        ("x" * 20, "x" * 20),
    ],
)
def test_words(word, shown):
    assert plotting.legible(word) == shown
