"""The figures of a comparison (PNG), and its page `report.html`.

They show the scores of every seed, learning curves, and scores under noise.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignvlm_jax import storage
from alignvlm_jax.analysis import noise as noise_lib
from alignvlm_jax.pictures import html, plotting
from alignvlm_jax.report import compare_tables
from alignvlm_jax.report.compare import REACHED, Row, Tables

BAR, BLANK = plotting.COLORS[:2]
DOT = "#12345a"


def scores(rows: Sequence[Row]) -> bytes:
    """Returns a PNG of the ANLS of every row.

    It has a bar for the mean, a dot for each seed, and a mark for the mean score on blank pages.
    """

    def draw(figure: Figure) -> None:
        _draw_scores(figure.add_subplot(), rows)

    return plotting.png((7.6, 1.0 + 0.42 * len(rows)), draw)


def learning(rows: Sequence[Row]) -> bytes:
    """Returns a PNG of the ANLS of generated answers over training steps.

    Each row is a line for the mean over its seeds, and a band for their range.
    """

    def draw(figure: Figure) -> None:
        _draw_learning(figure.add_subplot(), rows)

    return plotting.png((7.6, 3.6), draw)


def noise(rows: Sequence[Row]) -> bytes:
    """Returns a PNG of the scores of all rows under noise on the features, means over seeds."""
    return noise_lib.FEATURES.curves(
        {row.name.replace("_", " "): _mean(row.analysis("noise")) for row in rows}
    )


def _draw_scores(axes: Axes, rows: Sequence[Row]) -> None:
    # Labels only for the first row: each would be a line of the legend.
    for place, row in enumerate(rows):
        values = row.values("anls")
        axes.barh(
            place,
            values.mean(),
            color=BAR,
            height=0.6,
            alpha=0.85,
            label="mean" if not place else None,
        )
        label = "a seed" if not place else None
        axes.scatter(values, [place] * len(values), color=DOT, s=16, zorder=3, label=label)
        label = "blank page, mean" if not place else None
        axes.scatter(
            row.values("anls_blind").mean(),
            place,
            color=BLANK,
            marker="|",
            s=120,
            zorder=3,
            label=label,
        )
    axes.set_yticks(range(len(rows)), [row.name.replace("_", " ") for row in rows])
    # Bars are drawn from the bottom up: turned round, the best row is on top.
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("ANLS")
    axes.grid(axis="x")
    # Above the bars: any place among them may be taken.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)


def _draw_learning(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        curves = [
            {line["step"]: line["generated/anls"] for line in run.lines if "generated/anls" in line}
            for run in row.runs
        ]
        # A run that was interrupted during an in-training eval lacks that point: only the steps
        # that all seeds have can be averaged. values is [seeds, steps].
        steps = sorted(set.intersection(*map(set, curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        color = plotting.color(number)
        axes.plot(
            steps, values.mean(0), color=color, linewidth=1.6, label=row.name.replace("_", " ")
        )
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.axhline(REACHED, color="#00000066", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.set_ylabel("ANLS while training")
    axes.set_xlabel("steps")
    axes.grid(axis="y")
    axes.legend(fontsize=8.5)


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the means over runs of what a figure of noise shows, in the form of one result."""
    # By sigma: the points of all runs.
    points = zip(*(run["points"] for run in runs), strict=True)
    # All runs were measured at RELATIVE_SIGMAS: the points at one place are of one sigma.
    names = ("relative_sigma", "anls", "centred_distance")
    return {
        "centred_between_distance": float(
            np.mean([run["centred_between_distance"] for run in runs])
        ),
        "points": [
            {name: float(np.mean([point[name] for point in same])) for name in names}
            for same in points
        ],
    }


FILE = "report.html"


def build(tables: Tables, folder: Path) -> Path:
    """Writes report.html and the figures TABLE_{scores,learning,noise}.png in `folder`.

    Returns:
      The path of the page.
    """
    parts = []
    for (name, grids), rows in zip(
        compare_tables.grids(tables).items(), tables.values(), strict=True
    ):
        pictures = {
            "scores": scores(rows),
            "learning": learning(rows),
            "noise": noise(rows),
        }
        for kind, picture in pictures.items():
            storage.write_whole(folder / f"{name}_{kind}.png", picture)
        uris = {kind: html.png_uri(picture) for kind, picture in pictures.items()}
        parts.append({"grids": grids, "pictures": uris})
    path = folder / FILE
    storage.write_whole(path, html.render("comparison.html", parts=parts, folder=folder))
    return path
