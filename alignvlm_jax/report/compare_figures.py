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
from alignvlm_jax.report.compare import REACHED, Row, Tables, settings

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


def overview(found: Mapping[str, Mapping[str, Row]]) -> bytes:
    """Returns a PNG of the ANLS of the rows of every setting, without noise and with it: the mean
    over seeds, and a line from the least to the most."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(compare_tables.SIGMAS), sharey=True)
        for axes, sigma in zip(panels, compare_tables.SIGMAS, strict=True):
            _draw_settings(axes, found, sigma)
        panels[0].set_ylabel("ANLS")
        panels[0].legend(fontsize=8.5)

    return plotting.png((6.2 * len(compare_tables.SIGMAS), 4.2), draw)


def _draw_settings(axes: Axes, found: Mapping[str, Mapping[str, Row]], sigma: float) -> None:
    names = list(next(iter(found.values())))
    for number, name in enumerate(names):
        values = [compare_tables.anls(rows[name], sigma) for rows in found.values()]
        # Beside each other within a setting: as points of one place they would hide each other.
        places = np.arange(len(found)) + 0.16 * (number - (len(names) - 1) / 2)
        # From the least to the most, as in the tables: three seeds have no deviation to speak of.
        color = plotting.color(number)
        lows, highs = zip(*((one.min(), one.max()) for one in values), strict=True)
        axes.vlines(places, lows, highs, color=color, linewidth=1.4)
        means = [one.mean() for one in values]
        axes.scatter(places, means, s=26, color=color, zorder=3, label=name.replace("_", " "))
    titles = [name.replace("_", "\n") for name in found]
    axes.set_xticks(range(len(found)), titles, fontsize=8.5)
    unit = "standard deviation" if sigma == 1 else "standard deviations"
    axes.set_title(f"Noise of {sigma:g} {unit}" if sigma else "Without noise")
    axes.set_ylim(0, 1)
    axes.grid(axis="y")


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
    """Writes report.html and the figures TABLE_{scores,learning,noise}.png in `folder`, and
    overview.png if the tables are settings of one comparison.

    Returns:
      The path of the page.
    """
    first = None
    if found := settings(tables):
        picture = overview(found)
        storage.write_whole(folder / "overview.png", picture)
        first = {"grids": compare_tables.overview(tables), "picture": html.png_uri(picture)}
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
    storage.write_whole(
        path, html.render("comparison.html", overview=first, parts=parts, folder=folder)
    )
    return path
