"""Robustness of a connector to perturbations (arXiv 2502.01341, section 5.4).

The paper adds Gaussian noise to the features just before the connector; here the page's pixels may
be perturbed too, or its content moved. Two things are measured: the scores of the answers, and the
displacement of visual tokens (`displacement`). Moved content has no distances, because a patch then
shows something else.

The paper's noise has sigma 3 on features of unknown scale. Sigmas are therefore also given in units
of the features' standard deviation, which compare between models; shifts are also given in patches.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from alignvlm_jax.analysis import base, displacement, perturbation
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.analysis.flags import KINDS_OF_NOISE
from alignvlm_jax.analysis.perturbation import FeatureNoise, PixelNoise, Shift
from alignvlm_jax.data.record import Record
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.pictures import plotting

Found = Mapping[str, Any]

COLUMNS = {
    "sigma": ("noise, sigma", ".3f"),
    "relative_sigma": ("in standard deviations", ".2f"),
    "shift": ("moved by at most, pixels", "d"),
    "relative_shift": ("in patches", ".2f"),
    "anls": ("ANLS", ".3f"),
    "exact_match": ("exact match", ".3f"),
    "distance": ("cosine distance", ".4f"),
    "centred_distance": ("its mean removed", ".4f"),
}
"""The title and the format of the column of each field of a point."""

INCHES = (5.0, 3.8)
"""Width and height of a panel."""


class Noise(Analysis):
    """The base class of analyses of a perturbation: table, figure and sentence.

    Attributes:
      curve_over: the field of a point on the x axis of curves, and the label of that axis, whose
        braces name fields of the result.
      size_in_words: the field of a point by which the sentence names sizes, and a format for it.
    """

    curve_over: tuple[str, str]
    size_in_words: tuple[str, str]

    def kinds(self) -> Mapping[str, Analysis]:
        return KINDS

    def show(self, console: Console, found: Found) -> None:
        """Prints a table with a row for each size, and the distances to compare with."""
        if "feature_std" in found:
            console.print(
                f"The features' standard deviation over patches is {found['feature_std']:.3f}."
            )
        if "patch_pixels" in found:
            console.print(
                f"The shorter side of a patch is {found['patch_pixels']:.3g} pixels of the page."
            )
        # Kinds differ in what a point has; all points of one result have the same.
        columns = {name: column for name, column in COLUMNS.items() if name in found["points"][0]}
        table = base.table(*(title for title, _ in columns.values()))
        for point in found["points"]:
            table.add_row(*(format(point[name], spec) for name, (_, spec) in columns.items()))
        console.print(table)
        if "between_distance" in found:
            console.print(
                "Between different visual tokens, without noise: cosine distance "
                f"{found['between_distance']:.4f}, with the mean removed "
                f"{found['centred_between_distance']:.4f}."
            )

    def picture(self, connector: str, found: Found) -> bytes:
        return self.curves({connector: found})

    def curves(self, results: Mapping[str, Found]) -> bytes:
        """Returns a PNG of the ANLS over the size of the perturbation, a curve for each result.

        Results with distances have a second panel: the displacement of visual tokens with the mean
        removed, as a fraction of the distance between different ones.

        Args:
          results: results of one kind of perturbation, by the name of their curve.
        """
        first = next(iter(results.values()))
        field, label = self.curve_over
        with_distances = "centred_between_distance" in first

        def draw(figure: Figure) -> None:
            # squeeze=False gives an array [1, panels] even for a single panel.
            panels = figure.subplots(1, 1 + with_distances, squeeze=False)[0]
            _draw_scores(panels[0], results, field)
            if with_distances:
                _draw_distances(panels[1], results, field)
            for axes in panels:
                axes.set_xlabel(label.format(**first))
                axes.grid(axis="y")

        return plotting.png((INCHES[0] * (1 + with_distances), INCHES[1]), draw)

    def sentence(self, written: Found) -> str:
        field, size = self.size_in_words
        clean, *points = written["points"]
        text = f"Undisturbed, the answers score ANLS {clean['anls']:.3f}"
        if not points:
            return f"{text}."
        # Only up to the first loss: a larger size that scores well again does so by chance.
        enough = 0.9 * clean["anls"]
        kept = [*itertools.takewhile(lambda point: point["anls"] >= enough, points)]
        last = points[-1]
        if kept and clean["anls"]:
            text += f"; at least nine tenths of that are left up to {size.format(kept[-1][field])}"
        elif clean["anls"]:  # Of nothing there are no nine tenths.
            least = size.format(points[0][field])
            text += f"; less than nine tenths of that are left at {least} already"
        text += f", and ANLS {last['anls']:.3f} at {last[field]:.3g}"
        if "centred_distance" in last:
            fraction = last["centred_distance"] / written["centred_between_distance"]
            text += (
                f", which moves visual tokens by {fraction:.2f} of the distance between different "
                "ones"
            )
        return f"{text}."


class NoiseOnFeatures(Noise):
    """The analysis of Gaussian noise on the vision features, as in the paper."""

    name = "noise"
    title = "Noise on the vision features"
    curve_over = ("relative_sigma", "noise, standard deviations of the features")
    size_in_words = ("relative_sigma", "noise of {:.3g} times the features' standard deviation")

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure_features(
            loaded, args.split, args.sigmas, args.relative_sigmas, args.num_pages, args.seed
        )


class NoiseOnPixels(Noise):
    """The analysis of Gaussian noise on the page's pixels."""

    name = "noise_pixels"
    title = "Noise on the pixels"
    curve_over = ("sigma", "noise on pixels, fraction of the range from black to white")
    size_in_words = ("sigma", "noise of {:.3g} of the range from black to white")

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure_pixels(loaded, args.split, args.sigmas, args.num_pages, args.seed)


class MovedContent(Noise):
    """The analysis of content of the page that is moved by whole pixels."""

    name = "noise_layout"
    title = "Content that is moved"
    curve_over = (
        "relative_shift",
        "content moved by at most, patches of {patch_pixels:.3g} pixels",
    )
    size_in_words = ("shift", "shifts of at most {} px")

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure_layout(loaded, args.split, args.shifts, args.relative_shifts, args.seed)


FEATURES = NoiseOnFeatures()
KINDS = dict(zip(KINDS_OF_NOISE, (FEATURES, NoiseOnPixels(), MovedContent()), strict=True))
"""The kinds of perturbation by their name on the command line (`--kind`)."""

ANALYSIS = FEATURES


def measure_features(
    loaded: Loaded,
    split: str,
    sigmas: Sequence[float],
    relative_sigmas: Sequence[float],
    num_pages: int,
    seed: int,
) -> dict[str, Any]:
    """Returns the scores and displacements under noise on the features.

    The result has a point for each sigma, in ascending order and beginning with no noise. A point
    has the scores, the mean `distance` between visual tokens with and without noise, and
    `centred_distance`, for which the mean token of the clean pages is subtracted from both.

    Args:
      loaded: the model; its config gives the folder of the data and the number of questions.
      split: name of the split whose questions are used.
      sigmas: standard deviations of the noise, in the unit of the features.
      relative_sigmas: standard deviations in units of the features' own, `feature_std`.
      num_pages: number of records, among those with questions, whose features and visual tokens
        are compared.
      seed: seed of the noise.

    Raises:
      UserError: the split is missing, has no questions or no images.
    """
    pages = perturbation.pages_with_questions(loaded, split)[:num_pages]
    feature_std = displacement.feature_std(loaded, pages)
    # A set: a sigma that is given in both units is measured once.
    sizes = sorted({0.0, *sigmas, *(relative * feature_std for relative in relative_sigmas)})
    trials = [FeatureNoise(sigma, seed) for sigma in sizes]
    # Curves are drawn over the relative sigma, by which models of other features compare.
    points = [{"sigma": sigma, "relative_sigma": sigma / feature_std} for sigma in sizes]
    return {"feature_std": feature_std, **_with_distances(loaded, split, pages, points, trials)}


def measure_pixels(
    loaded: Loaded, split: str, sigmas: Sequence[float], num_pages: int, seed: int
) -> dict[str, Any]:
    """Returns the scores and displacements under noise on the pixels, as `measure_features` does.

    Args:
      loaded: the model.
      split: name of the split whose questions are used.
      sigmas: standard deviations of the noise, as fractions of the range from black to white.
      num_pages: number of records whose visual tokens are compared.
      seed: seed of the noise.
    """
    pages = perturbation.pages_with_questions(loaded, split)[:num_pages]
    # Sigmas of flags are above 0, so that 0 comes first.
    sizes = sorted({0.0, *sigmas})
    # The first is no noise on features, so that kinds share the file of unperturbed answers.
    trials = [perturbation.none(seed), *(PixelNoise(sigma, seed) for sigma in sizes[1:])]
    points = [{"sigma": sigma} for sigma in sizes]
    return {"kind": "pixels", **_with_distances(loaded, split, pages, points, trials)}


def _with_distances(
    loaded: Loaded, split: str, pages: Sequence[Record], points: Sequence[dict], trials: Sequence
) -> dict[str, Any]:
    """Returns the points with the scores and distances of their trials added."""
    # Distances first, since they take less time: an unreadable page is found before any answer is
    # generated.
    between, displaced = displacement.measure(loaded, pages, trials)
    scores = perturbation.scores(loaded, split, trials)
    found = [a | b | c for a, b, c in zip(points, scores, displaced, strict=True)]
    return {"num_pages": len(pages), **between, "points": found}


def measure_layout(
    loaded: Loaded, split: str, shifts: Sequence[int], relative_shifts: Sequence[float], seed: int
) -> dict[str, Any]:
    """Returns the scores for pages whose content is moved, by the largest shift, from 0 on.

    Args:
      loaded: the model, as for `measure_features`.
      split: name of the split whose questions are used.
      shifts: largest shifts in pixels of the page.
      relative_shifts: largest shifts in units of `patch_pixels`, the shorter side of a patch on the
        page; they are rounded to pixels, to at least 1.
      seed: seed of the shifts.
    """
    # A patch covers more pixels of a page that is scaled down to its tiles.
    side = perturbation.patch_side(loaded, perturbation.pages_with_questions(loaded, split))
    # A shift that rounds to 0 would be the unperturbed point once more.
    sizes = sorted({0, *shifts, *(max(1, round(relative * side)) for relative in relative_shifts)})
    trials = [perturbation.none(seed), *(Shift(shift, seed) for shift in sizes[1:])]
    points = [{"shift": shift, "relative_shift": shift / side} for shift in sizes]
    scores = perturbation.scores(loaded, split, trials)
    found = [a | b for a, b in zip(points, scores, strict=True)]
    return {"kind": "layout", "patch_pixels": side, "points": found}


def _draw_scores(axes: Axes, results: Mapping[str, Found], field: str) -> None:
    _draw_curves(axes, results, field, lambda found, point: point["anls"])
    axes.set_title("ANLS")
    axes.set_ylim(0, 1.02)
    axes.legend()


def _draw_distances(axes: Axes, results: Mapping[str, Found], field: str) -> None:
    def fraction(found: Found, point: Found) -> float:
        return point["centred_distance"] / found["centred_between_distance"]

    _draw_curves(axes, results, field, fraction)
    axes.set_title("Movement of visual tokens / distance between them")
    # At 1 a token is as far from itself as it is from any other.
    axes.axhline(1, color="#00000066", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)


def _draw_curves(
    axes: Axes, results: Mapping[str, Found], field: str, value: Callable[[Found, Found], float]
) -> None:
    """Draws a curve for each result: `value` of its points over their `field`."""
    style = {"marker": "o", "markersize": 4, "linewidth": 1.6}
    for number, (name, found) in enumerate(results.items()):
        sizes = [point[field] for point in found["points"]]
        values = [value(found, point) for point in found["points"]]
        axes.plot(sizes, values, color=plotting.color(number), label=name, **style)
