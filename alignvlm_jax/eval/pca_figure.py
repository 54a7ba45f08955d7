"""What `pca.measure` found, as a picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignvlm_jax.eval import plotting

INCHES = (10.0, 4.6)
CHOSEN = "chosen"


def picture(found: Mapping[str, Any]) -> bytes:
    """Returns a PNG: words on the first two principal components, the chosen ones highlighted, and how well they cover
    all beside random and frequent ones."""

    def draw(figure: Figure) -> None:
        points, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
        _draw_points(points.add_subplot(), found)
        explained, nearest = right.subplots(2, 1)
        sets = found["sets"]
        _draw_sets(explained, {name: one["explained"] for name, one in sets.items()}, "{:.1%}")
        explained.set_title("Explained variance of all words")
        _draw_sets(nearest, {name: one["nearest"] for name, one in sets.items()}, "{:.3f}")
        nearest.set_title("Distance of the other words")

    return plotting.png(INCHES, draw)


def _draw_points(axes: Axes, found: Mapping[str, Any]) -> None:
    every, chosen = (np.array(found["points"][name]) for name in ("all", CHOSEN))
    axes.scatter(*every.T, s=11, color=plotting.QUIET, linewidths=0, label=f"all {found['num_words']:,} words")
    axes.scatter(
        *chosen.T, s=15, color=plotting.COLORS[0], alpha=0.75, linewidths=0, label=f"{found['num_chosen']:,} chosen"
    )
    axes.set_title("Text embeddings")
    for share, name, label in zip(
        found["shares"], ("first", "second"), (axes.set_xlabel, axes.set_ylabel), strict=False
    ):
        label(f"{name} component, {share:.1%} of the variance")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, markerscale=1.8, handletextpad=0.1)


def _draw_sets(axes: Axes, values: Mapping[str, float | None], form: str) -> None:
    """A bar a set; none where there is no value."""
    texts = ["none is left" if value is None else form.format(value) for value in values.values()]
    colors = [plotting.COLORS[0] if name == CHOSEN else plotting.QUIET for name in values]
    plotting.bars(axes, list(values), [value or 0.0 for value in values.values()], texts, colors)
