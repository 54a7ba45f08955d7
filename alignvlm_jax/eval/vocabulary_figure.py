"""What `vocabulary.measure` found, as a picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from alignvlm_jax.eval import plotting

INCHES = (10.0, 5.2)
TRIALS = {"all": "all {:,} words", "mean": "{:,} by their mean", "highest": "{:,} by their highest"}
"""Their names, by what chose the words."""


def picture(found: Mapping[str, Any]) -> bytes:
    """Returns a PNG: the words of the largest mean, how sharp patches are, and the scores with some words alone."""

    def draw(figure: Figure) -> None:
        words, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
        _draw_words(words.add_subplot(), found)
        entropies, scores = right.subplots(2, 1, height_ratios=(1.6, 1))
        _draw_entropies(entropies, found)
        _draw_scores(scores, found)

    return plotting.png(INCHES, draw)


def _draw_words(axes: Axes, found: Mapping[str, Any]) -> None:
    words = found["top_words"]
    means = [word["mean"] for word in words]
    colors = [plotting.COLORS[0]] * len(words)
    plotting.bars(axes, [plotting.legible(word["token"]) for word in words], means, [f"{m:.2g}" for m in means], colors)
    axes.set_title("Mean probability of a word")
    for label in axes.get_yticklabels():
        label.set(fontfamily="monospace", fontsize=10)


def _draw_entropies(axes: Axes, found: Mapping[str, Any]) -> None:
    histogram = found["entropy_histogram"]
    shares = np.array(histogram["patches"]) / found["num_patches"]
    axes.stairs(shares, histogram["edges"], fill=True, color=plotting.COLORS[0])
    axes.set_title("Entropy of a patch's distribution")
    axes.set_xlabel("bits")
    axes.set_ylabel("patches")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y")
    axes.set_xlim(0, histogram["edges"][-1])
    of_mean = np.log2(found["mean_perplexity"])
    axes.axvline(of_mean, color="#1c2127", linewidth=1, linestyle=":")
    side, gap = ("right", -4) if of_mean > histogram["edges"][-1] / 2 else ("left", 4)
    axes.annotate(
        "that of their mean", (of_mean, 0.93), (gap, 0), xycoords=axes.get_xaxis_transform(),
        textcoords="offset points", fontsize=9, ha=side, va="center",
    )  # fmt: skip


def _draw_scores(axes: Axes, found: Mapping[str, Any]) -> None:
    trials = found["pruning"]
    names = [TRIALS[trial["words"]].format(trial["num_words"]) for trial in trials]
    scores = [trial["anls"] for trial in trials]
    colors = [plotting.QUIET] + [plotting.COLORS[0]] * (len(trials) - 1)
    plotting.bars(axes, names, scores, [f"{score:.3f}" for score in scores], colors)
    axes.set_title("ANLS with these words alone")
