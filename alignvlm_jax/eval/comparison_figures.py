"""A comparison as pictures: scores of every seed, curves of learning, and what noise does. PNG files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignvlm_jax.eval import noise_figure, plotting
from alignvlm_jax.eval.comparison import REACHED, Row

BAR, BLANK = plotting.COLORS[:2]
DOT = "#12345a"


def scores(rows: Sequence[Row]) -> bytes:
    """Returns the ANLS of every row: a bar for the mean, a dot for each seed, and the score on blank pages."""

    def draw(figure: Figure) -> None:
        _draw_scores(figure.add_subplot(), rows)

    return plotting.png((7.6, 0.7 + 0.42 * len(rows)), draw)


def learning(rows: Sequence[Row]) -> bytes:
    """Returns the ANLS of generated answers over the steps of training: the mean over seeds, and their span."""

    def draw(figure: Figure) -> None:
        _draw_learning(figure.add_subplot(), rows)

    return plotting.png((7.6, 3.6), draw)


def noise(rows: Sequence[Row]) -> bytes:
    """Returns `noise_figure.picture` of all rows, means over their seeds."""
    return noise_figure.picture({row.name.replace("_", " "): _mean(row.analysis("noise")) for row in rows})


def _draw_scores(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        values = row.values("anls")
        axes.barh(place, values.mean(), color=BAR, height=0.6, alpha=0.85, label="mean" if not place else None)
        label = "a seed" if not place else None
        axes.scatter(values, [place] * len(values), color=DOT, s=16, zorder=3, label=label)
        label = "blank page, mean" if not place else None
        axes.scatter(row.values("anls_blind").mean(), place, color=BLANK, marker="|", s=120, zorder=3, label=label)
    axes.set_yticks(range(len(rows)), [row.name.replace("_", " ") for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("ANLS")
    axes.grid(axis="x")
    axes.legend(loc="lower right")


def _draw_learning(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        curves = [
            {line["step"]: line["generated/anls"] for line in run.lines if "generated/anls" in line} for run in row.runs
        ]
        # A run that was stopped while it was asked lacks a point.
        steps = sorted(set.intersection(*map(set, curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        color = plotting.color(number)
        axes.plot(steps, values.mean(0), color=color, linewidth=1.6, label=row.name.replace("_", " "))
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.axhline(REACHED, color="#00000066", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.set_ylabel("ANLS while training")
    axes.set_xlabel("steps")
    axes.grid(axis="y")
    axes.legend(fontsize=8.5)


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over runs of what a picture of noise shows."""
    points = zip(*(run["points"] for run in runs), strict=True)
    names = ("relative_sigma", "anls", "centred_distance")
    return {
        "centred_between_distance": float(np.mean([run["centred_between_distance"] for run in runs])),
        "points": [{name: float(np.mean([point[name] for point in same])) for name in names} for same in points],
    }
