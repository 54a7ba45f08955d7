"""Curves of a run as inline SVG.

The SVG takes its text colour from the page, so that it is legible on light and dark backgrounds.
"""

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignvlm_jax.pictures import plotting

# Matplotlib takes no CSS colours: these two stand for the page's own until the SVG is written.
TEXT = "#010203"
GRID = "#010204"
THIS, OTHER = plotting.COLORS[:2]
SMOOTHING = 15  # points of training metrics that a line averages over

STYLE = plotting.STYLE | {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "alignvlm_jax",  # ids that do not change from one report to the next
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A panel of the report: metrics against the training step.

    Attributes:
      title: its title.
      training: name of a metric of training lines, "" for none.
      validation: name of a metric of validation lines.
      log: whether the y axis is logarithmic.
    """

    title: str
    training: str
    validation: str
    log: bool


CURVES = (
    Curve("Answer loss, nats a token", "answer_loss", "validation/answer_loss", log=True),
    Curve("Patch-token loss, nats a patch", "patch_loss", "validation/patch_loss", log=True),
    Curve("Token accuracy on answers", "token_accuracy", "validation/token_accuracy", log=False),
    Curve("ANLS of generated answers", "", "generated/anls", log=False),
)


def curves(lines: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Returns an SVG for each panel that has points.

    Args:
      lines: the lines of this run's metrics.jsonl. A metric may be missing in all of them, as that
        of the patch loss in a run without it.
      other: the lines of another run to compare with, which is drawn underneath.
    """
    panels = []
    for curve in CURVES:
        if any(len(points(lines, name, curve.log)) for name in (curve.training, curve.validation)):
            panels.append(_panel(curve, lines, other))
    return panels


def points(lines: Sequence[dict[str, Any]], name: str, log: bool) -> np.ndarray:
    """Returns the (step, value) pairs of a metric, float64 [n, 2], in order.

    Values that are not finite are left out; with `log`, so are those that are not positive.
    """
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    # [0, 2] where there are none, so that the columns below exist.
    values = np.asarray(found, float).reshape(-1, 2)
    keep = np.isfinite(values[:, 1]) & ((values[:, 1] > 0) | (not log))
    return values[keep]


def stage_spans(lines: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Returns (name, first step, last step) of each stage, in order.

    A stage begins where the one before it ends.
    """
    ends: dict[str, float] = {}
    for line in lines:
        ends[line["stage"]] = max(line["step"], ends.get(line["stage"], 0))
    # One more than there are stages: where the last ends, none begins.
    starts = [0, *ends.values()]
    return [(name, start, end) for (name, end), start in zip(ends.items(), starts, strict=False)]


def _panel(curve: Curve, lines: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    """Returns the SVG of a panel."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.0, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(f"{curve.title} (log)" if curve.log else curve.title, pad=19)
        axes.set_xlabel("step")
        if curve.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        _draw_run(axes, curve, other, OTHER)
        _draw_run(axes, curve, lines, THIS)
        if not curve.log:
            axes.set_ylim(0, 1.02)
        # Of both runs: a longer other one goes on where this one ends.
        last = max(line["step"] for line in (*lines, *other))
        _draw_stages(axes, stage_spans(lines), last)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        return _inline_svg(figure, curve.title)


def _draw_run(axes: Axes, curve: Curve, lines: Sequence[dict[str, Any]], color: str) -> None:
    """Draws a run's training metric, raw and smoothed, and its validation metric as points."""
    # [n, 2]; its transpose is the steps and the values.
    training = points(lines, curve.training, curve.log)
    axes.plot(*training.T, color=color, linewidth=0.8, alpha=0.3)
    # Stage by stage: at a new stage the loss may jump, and no line should bridge or smooth that.
    for _, start, end in stage_spans(lines):
        stage = training[(training[:, 0] > start) & (training[:, 0] <= end)]
        axes.plot(stage[:, 0], _smooth(stage[:, 1], curve.log), color=color, linewidth=1.6)
        checked = points(lines, curve.validation, curve.log)
        checked = checked[(checked[:, 0] > start) & (checked[:, 0] <= end)]
        axes.plot(
            *checked.T,
            color=color,
            linewidth=0.9,
            linestyle="--",
            marker="o",
            markersize=3.2,
            clip_on=False,
        )


def _smooth(values: np.ndarray, log: bool) -> np.ndarray:
    """Returns centred means over `SMOOTHING` values, [n] to [n]; geometric means with `log`.

    Near the ends, and where there are few values, means are over fewer of them.
    """
    # The window stays symmetric: a one-sided mean would hide how steeply a stage begins.
    values = np.log(values) if log else values
    widest = min(SMOOTHING // 2, len(values) // 10)
    # As many neighbours on either side as there are up to the nearer end.
    half = [min(widest, i, len(values) - 1 - i) for i in range(len(values))]
    means = np.array([values[i - h : i + h + 1].mean() for i, h in enumerate(half)])
    return np.exp(means) if log else means


def _draw_stages(axes: Axes, spans: list[tuple[str, float, float]], last: float) -> None:
    """Draws lines between stages and their numbers above the plot, from 1 as in the table of
    stages, with their names where these fit. The plot ends at the step `last`."""
    axes.set_xlim(0, last)
    for number, (name, start, end) in enumerate(spans, 1):
        if number > 1:
            axes.axvline(start, color=TEXT, linewidth=0.7, linestyle=":")
        # 0.027 is about the width of a character, in widths of the plot.
        full = f"{number} {name}"
        fits = (end - start) / last > len(full) * 0.027
        label = full if fits else str(number)
        axes.text(
            start,
            1.02,
            f" {label}",
            transform=axes.get_xaxis_transform(),
            fontsize=8.5,
            va="bottom",
        )


def _inline_svg(figure: Figure, label: str) -> str:
    """Returns a figure as an SVG element that fits the width of its container."""
    buffer = io.StringIO()
    # None leaves these out: with a date no two reports of one run would be equal.
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    svg = buffer.getvalue()
    # Without the XML declaration and doctype, which HTML does not allow there, and without a fixed
    # size: the viewBox keeps the proportions.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' width="[\d.]+pt"', "", re.sub(r' height="[\d.]+pt"', "", svg, count=1), count=1)
    svg = svg.replace(TEXT, "currentColor").replace(GRID, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
