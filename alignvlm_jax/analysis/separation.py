"""Separation of visual tokens at the LLM's input: how well they tell which token a patch shows.

It is what a connector's robustness should follow from. A visual token is as good as its distance to
those of other letters is large beside the scatter of its own; if all of them are alike, as averages
of many embeddings are, any noise takes one to the place of another. Patches count whose largest
label fills at least half of them, and letters of several such patches.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from alignvlm_jax.analysis import base, displacement, shown
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.analysis.perturbation import FeatureNoise
from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.pictures import plotting

MIN_WEIGHT = 0.5
"""Fraction of a patch that its largest label fills at least."""
MIN_PATCHES = 4
"""Patches that a letter has at least: each is compared with the mean of the others."""
NUM_BINS = 48
NOISES = {"clean": "without noise", "noisy": "with noise of one standard deviation"}


class Separation(Analysis):
    """The analysis of the distances between visual tokens of equal and of different letters."""

    name = "separation"
    title = "Visual tokens of different letters"
    needs_token_per_patch = True

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure(loaded, args.pages, args.num_pages, args.seed)

    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints the mean cosines, and the margin without noise and with it."""
        console.print(
            f"{found['num_patches']:,} patches that show one of {found['num_letters']:,} letters. "
            f"Mean cosine between visual tokens of equal letters {found['cosine_equal']:.3f}, of "
            f"different ones {found['cosine_different']:.3f}; with the mean of all removed "
            f"{found['centred_equal']:.3f} and {found['centred_different']:.3f}."
        )
        table = base.table("", "margin, scatter of a letter", "nearest to their own letter")
        for name, title in NOISES.items():
            table.add_row(title, f"{found[name]['margin']:.3f}", f"{found[name]['own']:.1%}")
        console.print(table)

    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of the margins of all patches, without noise and with it."""

        def draw(figure: Figure) -> None:
            axes = figure.add_subplot()
            for number, (name, title) in enumerate(NOISES.items()):
                fractions = np.array(found[name]["patches"]) / found["num_patches"]
                axes.stairs(
                    fractions,
                    found["edges"],
                    fill=True,
                    alpha=0.55,
                    color=plotting.color(number),
                    label=title,
                )
            # Left of it a token is nearer to those of another letter.
            axes.axvline(0, color="#1c2127", linewidth=0.8, linestyle=":")
            axes.set_title(f"Margin of {connector}'s visual tokens")
            axes.set_xlabel("nearest other letter's distance - own letter's, in its scatter")
            axes.set_ylabel("fraction of patches")
            axes.legend()

        return plotting.png((6.4, 3.6), draw)

    def sentence(self, written: Mapping[str, Any]) -> str:
        clean, noisy = (written[name] for name in NOISES)
        return (
            f"Of {written['num_patches']:,} patches that show a letter {100 * clean['own']:.0f} % "
            "have a visual token that is nearer to the mean of their own letter than to any other, "
            f"by {clean['margin']:.2f} times the scatter of a letter; with noise of one standard "
            f"deviation of the features {100 * noisy['own']:.0f} %."
        )


ANALYSIS = Separation()


class Margins(NamedTuple):
    """Distances of n vectors from the mean of their own class and from the nearest other mean.

    Attributes:
      own: float64 [n].
      other: float64 [n].
    """

    own: np.ndarray
    other: np.ndarray


def measure(loaded: Loaded, split: str, num_pages: int, seed: int) -> dict[str, Any]:
    """Returns cosines between visual tokens of equal and of different letters, and their margin.

    Args:
      loaded: the model.
      split: name of the split whose pages are used.
      num_pages: number of its records that are used, spread evenly.
      seed: of the noise.

    Raises:
      UserError: the split is missing, or its patches show fewer than two letters often enough.
    """
    pages = base.pages(loaded, split, num_pages)
    letters = letters_of(loaded, pages)
    is_used = letters != shown.NONE
    if not tells_letters(letters):
        raise UserError(
            f"split {split!r} in {loaded.config.data.dir}: of {len(letters):,} patches "
            f"{is_used.sum():,} are filled by a token that fills at least {MIN_PATCHES} of them; "
            "two different ones are needed"
        )
    sigma = displacement.feature_std(loaded, pages)
    # The noise that connectors are compared at: it is of one size for features of any scale.
    noises = zip(NOISES, (FeatureNoise(0.0, seed), FeatureNoise(sigma, seed)), strict=True)
    tokens = {
        name: np.float64(displacement.visual_tokens(loaded, pages, noise)[is_used])
        for name, noise in noises
    }
    classes = np.unique(letters[is_used], return_inverse=True)[1]
    clean = tokens["clean"]
    centred = clean - clean.mean(0)
    equal, different = cosines(clean, classes)
    centred_equal, centred_different = cosines(centred, classes)
    found = {
        "num_patches": len(clean),
        "num_letters": int(classes.max()) + 1,
        "feature_std": sigma,
        "cosine_equal": equal,
        "cosine_different": different,
        "centred_equal": centred_equal,
        "centred_different": centred_different,
    }
    # Both in one unit, the scatter without noise: so that noise does not widen its own measure.
    scatter = np.sqrt((margins(clean, clean, classes).own ** 2).mean())
    by_noise = {name: margins(each, clean, classes) for name, each in tokens.items()}
    scaled = {name: (one.other - one.own) / (scatter or 1.0) for name, one in by_noise.items()}
    # The bins of both, so that their bars lie over each other.
    edges = np.histogram_bin_edges(np.concatenate([*scaled.values()]), NUM_BINS)
    found["edges"] = edges.round(4).tolist()
    for name, values in scaled.items():
        found[name] = {
            "margin": float(values.mean()),
            "own": float((values > 0).mean()),
            "patches": np.histogram(values, edges)[0].tolist(),
        }
    return found


def letters_of(loaded: Loaded, pages: Sequence[Record]) -> np.ndarray:
    """Returns the characters of the token that fills each patch of pages, int [patches]; `NONE` of
    one that none fills, or one that too few patches show."""
    labels = shown.of_patches(loaded, pages)
    letters = shown.characters(loaded.tokenizer, labels.tokens[:, 0])
    letters = np.where(labels.weights[:, 0] >= MIN_WEIGHT, letters, shown.NONE)
    known, counts = np.unique(letters, return_counts=True)
    return np.where(np.isin(letters, known[counts >= MIN_PATCHES]), letters, shown.NONE)


def tells_letters(letters: np.ndarray) -> bool:
    """Returns whether patches show two letters or more."""
    return len(np.unique(letters[letters != shown.NONE])) > 1


def cosines(vectors: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """Returns the mean cosine over all pairs of different vectors [n, D] of equal classes [n], and
    over all pairs of different ones."""
    units = displacement.unit(vectors)
    sums = np.zeros((classes.max() + 1, units.shape[1]))
    np.add.at(sums, classes, units)
    counts = np.bincount(classes)
    # Sums over pairs are squared lengths of sums: no [n, n] matrix.
    itself = (units**2).sum()
    within = (sums**2).sum() - itself
    every = (units.sum(0) ** 2).sum() - itself
    num_within = (counts * (counts - 1)).sum()
    num_between = len(units) * (len(units) - 1) - num_within
    return float(within / num_within), float((every - within) / num_between)


def margins(vectors: np.ndarray, clean: np.ndarray, classes: np.ndarray) -> Margins:
    """Returns the distances of vectors [n, D] from the means of classes of the `clean` vectors.

    A vector is left out of the mean of its own class: in a small one it would draw the mean to
    itself.
    """
    sums = np.zeros((classes.max() + 1, clean.shape[1]))
    np.add.at(sums, classes, clean)
    counts = np.bincount(classes)
    # No division by 0: a class has `MIN_PATCHES` vectors.
    own_means = (sums[classes] - clean) / (counts[classes] - 1)[:, None]
    means = sums / counts[:, None]
    # A class at a time, [n, D]: all at once would be [n, classes, D].
    distances = np.stack([np.linalg.norm(vectors - mean, axis=-1) for mean in means])
    # The own class is no other.
    distances[classes, np.arange(len(vectors))] = np.inf
    return Margins(np.linalg.norm(vectors - own_means, axis=-1), distances.min(0))
