"""Coverage of the space of text embeddings by the tokens that patches use.

The paper (arXiv 2502.01341, figure 4) plots the first two principal components of the LLM's text
embeddings and sees its 3.4K chosen tokens all over the plane. Any tokens would be, so the same
number of random and of most frequent ones are measured as well. There are two measures for each
set: the fraction of the variance of all embeddings that the set's own principal directions explain,
and the distance of the other tokens from their nearest token in the set.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from alignvlm_jax.analysis import base, vocabulary
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.data import shards
from alignvlm_jax.inference import patch_tokens
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.parallel import sharding
from alignvlm_jax.pictures import plotting

NUM_COMPONENTS = 10
MAX_SAMPLE = 1024
"""Most tokens whose nearest neighbours are searched, and most points of a set that are plotted."""

INCHES = (10.0, 4.6)
CHOSEN = "chosen"


class PCA(Analysis):
    """The analysis of how well the tokens that patches use cover the space of text embeddings."""

    name = "pca"
    title = "What these words span"
    needs_distribution = True

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure(loaded, args.pages, args.num_pages, args.threshold, args.seed)

    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints a table with a row for each set of tokens."""
        console.print(
            f"{found['num_chosen']:,} of {found['num_words']:,} words chosen. The first "
            f"{found['num_components']} principal components of all explain "
            f"{sum(found['shares']):.1%} of their variance, the first two "
            f"{sum(found['shares'][:2]):.1%}."
        )
        table = base.table("words", "its components explain", "distance to those outside")
        for name, one in found["sets"].items():
            # None: the set has all tokens.
            nearest = "-" if one["nearest"] is None else f"{one['nearest']:.3f}"
            table.add_row(name, f"{one['explained']:.1%}", nearest)
        console.print(table)

    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of all tokens on the first two principal components.

        The chosen tokens are highlighted; beside them are bars of the coverage by each set.
        """

        def draw(figure: Figure) -> None:
            points, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
            _draw_points(points.add_subplot(), found)
            explained, nearest = right.subplots(2, 1)
            sets = found["sets"]
            _draw_sets(explained, {name: one["explained"] for name, one in sets.items()}, "{:.1%}")
            explained.set_title("Explained variance of all words")
            _draw_sets(nearest, {name: one["nearest"] for name, one in sets.items()}, "{:.3f}")
            nearest.set_title("Distance of the other words")

        return plotting.png(INCHES, draw)

    def sentence(self, written: Mapping[str, Any]) -> str:
        chosen, random, frequent = (
            f"{100 * written['sets'][name]['explained']:.1f} %"
            for name in (CHOSEN, "random", "most frequent")
        )
        return (
            f"The first {written['num_components']} principal components of the "
            f"{written['num_chosen']:,} words that patches use explain {chosen} of the variance of "
            f"all {written['num_words']:,} text embeddings; those of as many random words explain "
            f"{random}, of the most frequent {frequent}."
        )


ANALYSIS = PCA()


@dataclasses.dataclass(frozen=True)
class Components:
    """The first k principal components of vectors of width D, largest variance first.

    Attributes:
      mean: mean of the vectors, [D].
      directions: orthonormal directions, [k, D].
      fractions: fraction of the variance that each direction explains, [k].
    """

    mean: np.ndarray
    directions: np.ndarray
    fractions: np.ndarray

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the coordinates [n, k] of vectors [n, D] along the directions."""
        return (vectors - self.mean) @ self.directions.T


def measure(
    loaded: Loaded, pages: str, num_pages: int, threshold: float, seed: int
) -> dict[str, Any]:
    """Returns the coverage of the text embeddings by each set of tokens, and coordinates to plot.

    Args:
      loaded: the model.
      pages: name of the split whose documents choose the tokens.
      num_pages: number of its documents that are used.
      threshold: a token is chosen if its largest probability in a patch is above it.
      seed: seed of the random tokens.

    Raises:
      UserError: the connector has no distribution over the vocabulary, the split is missing, or no
        token is chosen.
    """
    patch_tokens.check(loaded.config.model)
    used = vocabulary.usage(loaded, pages, num_pages)
    # The table's last rows, up to vocab_size, are padding that makes it divisible: no tokens.
    num_tokens = loaded.config.model.llm.unpadded_vocab_size
    # Replicated: of a table that is sharded over hosts none could read the whole.
    whole = jax.device_put(loaded.params["llm"]["embed"]["table"], sharding.replicated(loaded.mesh))
    table = np.float64(whole)[:num_tokens]
    chosen = used.kept("highest", threshold)[:num_tokens]
    whole = components(table, NUM_COMPONENTS)
    sets = token_sets(loaded, chosen, pages, seed)
    # One generator for all samples: their order is a part of the result.
    rng = np.random.default_rng(seed)
    return {
        "num_words": num_tokens,
        "num_chosen": int(chosen.sum()),
        "num_components": len(whole.fractions),
        "shares": whole.fractions.tolist(),
        "sets": {name: coverage(table, ids, rng) for name, ids in sets.items()},
        "points": {
            name: whole.project(table[sample(ids, rng)])[:, :2].round(5).tolist()
            for name, ids in {"all": np.arange(num_tokens), **sets}.items()
        },
    }


def token_sets(loaded: Loaded, chosen: np.ndarray, pages: str, seed: int) -> dict[str, np.ndarray]:
    """Returns the ids of three sets of tokens of the same size: chosen, random and most frequent.

    Args:
      loaded: the model.
      chosen: whether each token is chosen, bool [V].
      pages: name of the split in whose documents tokens are counted.
      seed: seed of the random tokens.
    """
    count = int(chosen.sum())
    counts = token_counts(loaded, pages, len(chosen))
    rng = np.random.default_rng(seed)
    return {
        CHOSEN: np.nonzero(chosen)[0],
        "random": np.sort(rng.choice(len(chosen), count, replace=False)),
        "most frequent": np.sort(np.argsort(-counts, kind="stable")[:count]),
    }


def token_counts(loaded: Loaded, split: str, num_tokens: int) -> np.ndarray:
    """Returns the frequency of each token in the documents of a split, int [num_tokens].

    Words of the pages, questions and answers count.
    """
    counts = np.zeros(num_tokens, int)
    records = shards.RecordSource(loaded.config.data.dir, split)
    for record in map(records.__getitem__, range(len(records))):
        # A line at a time, as the model is taught to transcribe it: words encoded one by one would
        # lack the spaces between them.
        shown = [" ".join(word.text for word in line) for page in record.lines for line in page]
        turns = [text for turn in record.turns for text in (turn.question, *turn.answers)]
        for text in shown + turns:
            ids = loaded.tokenizer.encode(text)
            counts += np.bincount(ids, minlength=num_tokens)[:num_tokens]
    return counts


def components(vectors: np.ndarray, count: int) -> Components:
    """Returns at most `count` principal components of vectors [n, D]."""
    mean = vectors.mean(0)
    centred = vectors - mean
    # Of the covariance [D, D], not an SVD of [n, D]: D is far below a vocabulary. Smallest first.
    variances, directions = np.linalg.eigh(centred.T @ centred)
    # n vectors lie in a space of n - 1 dimensions around their mean.
    count = min(count, len(variances), max(len(vectors) - 1, 1))
    # From the end, backwards: the `count` largest, the largest first.
    largest = slice(-1, -count - 1, -1)
    # Directions are columns of eigh's. Equal vectors have no variance to divide.
    total = variances.sum()
    return Components(mean, directions.T[largest], variances[largest] / (total if total > 0 else 1))


def coverage(table: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Returns two measures of how well a set of tokens covers the embeddings.

    Args:
      table: embeddings of all tokens, float64 [V, D].
      ids: the tokens of the set, int [n].
      rng: chooses the tokens outside whose distance is measured, `MAX_SAMPLE` at most.

    Returns:
      `explained`, the fraction of the variance of all rows along the set's own principal
      directions; and `nearest`, the mean distance of rows outside to the nearest row of the set, in
      units of the root mean square distance of rows from their mean (None if no row is outside).
    """
    centred = table - table.mean(0)
    # The directions are the set's own, the variance is that of all rows around the mean of all.
    own = components(table[ids], NUM_COMPONENTS)
    explained = ((centred @ own.directions.T) ** 2).sum() / (centred**2).sum()
    outside = sample(np.setdiff1d(np.arange(len(table)), ids), rng)
    # A row at a time, [set, D]: [outside, set, D] at once would fill the memory.
    distances = [np.linalg.norm(table[ids] - table[row], axis=-1).min() for row in outside]
    scale = np.sqrt((centred**2).sum(-1).mean())
    return {
        "explained": float(explained),
        "nearest": float(np.mean(distances) / scale) if distances else None,
    }


def sample(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns all ids, or a random choice of `MAX_SAMPLE` of them, sorted."""
    return ids if len(ids) <= MAX_SAMPLE else np.sort(rng.choice(ids, MAX_SAMPLE, replace=False))


def _draw_points(axes: Axes, found: Mapping[str, Any]) -> None:
    every, chosen = (np.array(found["points"][name]) for name in ("all", CHOSEN))
    # Points [n, 2], columns x and y. The chosen ones are drawn over all.
    axes.scatter(
        *every.T,
        s=11,
        color=plotting.QUIET,
        linewidths=0,
        label=f"all {found['num_words']:,} words",
    )
    axes.scatter(
        *chosen.T,
        s=15,
        color=plotting.COLORS[0],
        alpha=0.75,
        linewidths=0,
        label=f"{found['num_chosen']:,} chosen",
    )
    axes.set_title("Text embeddings")
    for fraction, name, label in zip(
        found["shares"], ("first", "second"), (axes.set_xlabel, axes.set_ylabel), strict=False
    ):
        label(f"{name} component, {fraction:.1%} of the variance")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, markerscale=1.8, handletextpad=0.1
    )


def _draw_sets(axes: Axes, values: Mapping[str, float | None], form: str) -> None:
    """Draws a bar for each set; a set without a value has none."""
    texts = ["none is left" if value is None else form.format(value) for value in values.values()]
    colors = [plotting.COLORS[0] if name == CHOSEN else plotting.QUIET for name in values]
    plotting.bars(axes, list(values), [value or 0.0 for value in values.values()], texts, colors)
