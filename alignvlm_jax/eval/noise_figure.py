"""What `noise.measure` found, as a picture: one connector, or several to compare."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INCHES = (10.0, 3.8)
DPI = 130


def picture(results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns a PNG of results by name, two panels over sigma in units of the features' standard deviation: ANLS, and
    how far visual tokens move with the mean removed, as a share of the distance between different ones."""
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained", facecolor="white")
    scores, distances = figure.subplots(1, 2)
    for number, (name, found) in enumerate(results.items()):
        style = {"color": colormaps["tab10"](number), "marker": "o", "markersize": 4, "linewidth": 1.6, "label": name}
        sigmas = [point["relative_sigma"] for point in found["points"]]
        scores.plot(sigmas, [point["anls"] for point in found["points"]], **style)
        between = found["centred_between_distance"]
        distances.plot(sigmas, [point["centred_distance"] / between for point in found["points"]], **style)
    scores.set_ylim(0, 1.02)
    # At 1 a token is as far from itself as it is from any other.
    distances.axhline(1, color="#00000066", linewidth=0.8, linestyle=":")
    distances.set_ylim(bottom=0)
    _label(scores, "ANLS")
    _label(distances, "Movement of visual tokens / distance between them")
    scores.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel("noise, standard deviations of the features")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#00000022", linewidth=0.6)
    axes.set_axisbelow(True)
