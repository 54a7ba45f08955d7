"""Curves of a run as inline SVG that takes its text colour from the page, so that it reads on light
and dark."""

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

TEXT = "#010203"  # Stands for the page's text colour until the SVG is written.
GRID = "#010204"
THIS, OTHER = plotting.COLORS[:2]
SMOOTHING = 15  # Points of training metrics that a line averages over.

STYLE = plotting.STYLE | {
    "svg.fonttype": "none",
    "svg.hashsalt": "alignvlm_jax",
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One panel: a metric of training lines, "" for none, and one of validation lines, against the
    step."""

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
    """Returns one SVG a panel: this run's metrics.jsonl `lines`, and under them those of a run to
    compare with.

    A panel without a single point is left out, as that of the patch loss is where nothing
    supervised it.
    """
    panels = []
    for curve in CURVES:
        if any(len(points(lines, name, curve.log)) for name in (curve.training, curve.validation)):
            panels.append(_panel(curve, lines, other))
    return panels


def points(lines: Sequence[dict[str, Any]], name: str, log: bool) -> np.ndarray:
    """Returns [n, 2] steps and finite values of a metric; of a logarithmic one, only what is above
    zero."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    values = np.asarray(found, float).reshape(-1, 2)
    keep = np.isfinite(values[:, 1]) & ((values[:, 1] > 0) | (not log))
    return values[keep]


def stage_spans(lines: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Returns name, first and last step of each stage, in order; each begins where the one before
    it ends."""
    ends: dict[str, float] = {}
    for line in lines:
        ends[line["stage"]] = max(line["step"], ends.get(line["stage"], 0))
    starts = [0, *ends.values()]
    return [(name, start, end) for (name, end), start in zip(ends.items(), starts, strict=False)]


def _panel(curve: Curve, lines: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.0, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(curve.title, pad=19)
        if curve.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        _draw_run(axes, curve, other, OTHER)
        _draw_run(axes, curve, lines, THIS)
        if not curve.log:
            axes.set_ylim(0, 1.02)
        _draw_stages(axes, stage_spans(lines))
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        return _inline_svg(figure, curve.title)


def _draw_run(axes: Axes, curve: Curve, lines: Sequence[dict[str, Any]], color: str) -> None:
    training = points(lines, curve.training, curve.log)
    axes.plot(*training.T, color=color, linewidth=0.8, alpha=0.3)
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
    """A centred mean over SMOOTHING points, fewer near the ends and where there are few; geometric
    for a logarithmic metric. The window stays symmetric: a one-sided one would hide how a stage
    begins."""
    values = np.log(values) if log else values
    widest = min(SMOOTHING // 2, len(values) // 10)
    half = [min(widest, i, len(values) - 1 - i) for i in range(len(values))]
    means = np.array([values[i - h : i + h + 1].mean() for i, h in enumerate(half)])
    return np.exp(means) if log else means


def _draw_stages(axes: Axes, spans: list[tuple[str, float, float]]) -> None:
    """Names stages above the plot, by number where the name is wider than the stage, and parts them
    by lines."""
    axes.set_xlim(0, spans[-1][2])
    for index, (name, start, end) in enumerate(spans):
        if index:
            axes.axvline(start, color=TEXT, linewidth=0.7, linestyle=":")
        fits = (end - start) / spans[-1][2] > len(name) * 0.027
        label = name if fits else str(index)
        axes.text(
            start,
            1.02,
            f" {label}",
            transform=axes.get_xaxis_transform(),
            fontsize=8.5,
            va="bottom",
        )


def _inline_svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' width="[\d.]+pt"', "", re.sub(r' height="[\d.]+pt"', "", svg, count=1), count=1)
    svg = svg.replace(TEXT, "currentColor").replace(GRID, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
