"""What a function of `noise` found, as a picture: one connector, or several to compare."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignvlm_jax.eval import plotting

INCHES = (5.0, 3.8)
"""Of a panel."""

AXES = {
    "features": ("relative_sigma", "noise, standard deviations of the features"),
    "pixels": ("sigma", "noise on pixels, share of the range from black to white"),
    "layout": ("relative_shift", "content moved by at most, patches of {patch_pixels:.3g} pixels"),
}
"""By kind of disturbance: the field of a point that the curves are over, and what it is; braces name results."""


def picture(results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns a PNG of results of one kind by name, over the size of the disturbance: ANLS, and, of kinds with
    distances, how far visual tokens move with the mean removed, as a share of the distance between different ones."""
    first = next(iter(results.values()))
    field, label = AXES[first.get("kind", "features")]
    with_distances = "centred_between_distance" in first

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 1 + with_distances, squeeze=False)[0]
        _draw_scores(panels[0], results, field)
        if with_distances:
            _draw_distances(panels[1], results, field)
        for axes in panels:
            axes.set_xlabel(label.format(**first))
            axes.grid(axis="y")

    return plotting.png((INCHES[0] * (1 + with_distances), INCHES[1]), draw)


def _draw_scores(axes: Axes, results: Mapping[str, Mapping[str, Any]], field: str) -> None:
    for number, (name, found) in enumerate(results.items()):
        _draw_curve(axes, number, name, found, field, [point["anls"] for point in found["points"]])
    axes.set_title("ANLS")
    axes.set_ylim(0, 1.02)
    axes.legend()


def _draw_distances(axes: Axes, results: Mapping[str, Mapping[str, Any]], field: str) -> None:
    for number, (name, found) in enumerate(results.items()):
        between = found["centred_between_distance"]
        _draw_curve(
            axes, number, name, found, field, [point["centred_distance"] / between for point in found["points"]]
        )
    axes.set_title("Movement of visual tokens / distance between them")
    # At 1 a token is as far from itself as it is from any other.
    axes.axhline(1, color="#00000066", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)


def _draw_curve(axes: Axes, number: int, name: str, found: Mapping[str, Any], field: str, values: list[float]) -> None:
    sizes = [point[field] for point in found["points"]]
    axes.plot(sizes, values, color=plotting.color(number), marker="o", markersize=4, linewidth=1.6, label=name)
