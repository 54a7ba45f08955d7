"""Whether the words that patches use span the space of text embeddings (arXiv 2502.01341, figure
4).

The paper plots the first two principal components of the LLM's text embeddings and sees its 3.4K
chosen words all over the plane. So would any words be: beside them stand as many random ones and
the most frequent ones. How well each set covers is measured twice: what fraction of the variance of
all embeddings the set's own principal directions explain, and how far the words left out are from
their nearest word in the set.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignvlm_jax.analysis import vocabulary
from alignvlm_jax.data import shards
from alignvlm_jax.inference import patch_tokens
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.pictures import plotting

NUM_COMPONENTS = 10
MAX_SAMPLE = 1024
"""Words whose nearest neighbours are looked for, and points of a set that are kept to plot."""


@dataclasses.dataclass(frozen=True)
class Components:
    """Principal components of vectors: their `mean` [D], the `directions` [k, D], largest variance
    first, and the `shares` of the variance that they explain [k]."""

    mean: np.ndarray
    directions: np.ndarray
    fractions: np.ndarray

    def project(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the coordinates of vectors [n, D], [n, k]."""
        return (vectors - self.mean) @ self.directions.T


def measure(
    loaded: Loaded, pages: str, num_pages: int, threshold: float, seed: int
) -> dict[str, Any]:
    """Returns what each set of words explains of the text embeddings, and coordinates to plot.

    Args:
      loaded: the model.
      pages: split whose documents choose the words.
      num_pages: documents of it.
      threshold: a word is chosen where its largest probability in a patch is above it.
      seed: of the random words.

    Raises:
      UserError: the connector has no distribution over words, the split is missing, or no word is
        chosen.
    """
    patch_tokens.check(loaded.config.model)
    used = vocabulary.usage(loaded, pages, num_pages)
    unpadded_vocab_size = loaded.config.model.llm.unpadded_vocab_size
    table = np.float64(jax.device_get(loaded.params["llm"]["embed"]["table"]))[:unpadded_vocab_size]
    chosen = used.kept("highest", threshold)[:unpadded_vocab_size]
    whole = components(table, NUM_COMPONENTS)
    sets = word_sets(loaded, chosen, pages, seed)
    rng = np.random.default_rng(seed)
    return {
        "num_words": unpadded_vocab_size,
        "num_chosen": int(chosen.sum()),
        "num_components": len(whole.fractions),
        "shares": whole.fractions.tolist(),
        "sets": {name: coverage(table, words, rng) for name, words in sets.items()},
        "points": {
            name: whole.project(table[sample(words, rng)])[:, :2].round(5).tolist()
            for name, words in {"all": np.arange(unpadded_vocab_size), **sets}.items()
        },
    }


def word_sets(loaded: Loaded, chosen: np.ndarray, pages: str, seed: int) -> dict[str, np.ndarray]:
    """Returns ids of the chosen words, bool [V], and of as many others: random ones, and those most
    frequent in the documents of a split, in what they show, what they are asked and what is
    answered (ties: the lower id)."""
    count = int(chosen.sum())
    counts = word_counts(loaded, pages, len(chosen))
    rng = np.random.default_rng(seed)
    return {
        "chosen": np.nonzero(chosen)[0],
        "random": np.sort(rng.choice(len(chosen), count, replace=False)),
        "most frequent": np.sort(np.argsort(-counts, kind="stable")[:count]),
    }


def word_counts(loaded: Loaded, split: str, unpadded_vocab_size: int) -> np.ndarray:
    """Returns how often each word stands in the documents of a split, int [num_words]."""
    counts = np.zeros(unpadded_vocab_size, int)
    records = shards.RecordSource(loaded.config.data.dir, split)
    for record in map(records.__getitem__, range(len(records))):
        shown = [" ".join(word.text for word in line) for page in record.lines for line in page]
        said = [text for turn in record.turns for text in (turn.question, *turn.answers)]
        for text in shown + said:
            counts += np.bincount(loaded.tokenizer.encode(text), minlength=unpadded_vocab_size)[
                :unpadded_vocab_size
            ]
    return counts


def components(vectors: np.ndarray, count: int) -> Components:
    """Returns at most `count` principal components of vectors [n, D]."""
    mean = vectors.mean(0)
    centred = vectors - mean
    variances, directions = np.linalg.eigh(centred.T @ centred)  # Smallest first.
    count = min(count, len(variances), max(len(vectors) - 1, 1))
    largest = slice(-1, -count - 1, -1)
    total = variances.sum()
    return Components(mean, directions.T[largest], variances[largest] / (total if total > 0 else 1))


def coverage(table: np.ndarray, words: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Returns how well a set of words, ids, covers the table [V, D]: `explained`, the fraction of
    the variance of all rows along the set's own principal directions; `nearest`, the mean distance
    of rows outside to the nearest in the set, in units of the rows' root mean square distance from
    their mean; None where no row is outside."""
    centred = table - table.mean(0)
    own = components(table[words], NUM_COMPONENTS)
    explained = ((centred @ own.directions.T) ** 2).sum() / (centred**2).sum()
    outside = sample(np.setdiff1d(np.arange(len(table)), words), rng)
    distances = [np.linalg.norm(table[words] - table[word], axis=-1).min() for word in outside]
    scale = np.sqrt((centred**2).sum(-1).mean())
    return {
        "explained": float(explained),
        "nearest": float(np.mean(distances) / scale) if distances else None,
    }


def sample(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the words, or MAX_SAMPLE of them."""
    return (
        words if len(words) <= MAX_SAMPLE else np.sort(rng.choice(words, MAX_SAMPLE, replace=False))
    )


INCHES = (10.0, 4.6)
CHOSEN = "chosen"


def picture(found: Mapping[str, Any]) -> bytes:
    """Returns a PNG: words on the first two principal components, the chosen ones highlighted, and
    how well they cover all beside random and frequent ones."""

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


def _draw_points(axes: Axes, found: Mapping[str, Any]) -> None:
    every, chosen = (np.array(found["points"][name]) for name in ("all", CHOSEN))
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
    """A bar a set; none where there is no value."""
    texts = ["none is left" if value is None else form.format(value) for value in values.values()]
    colors = [plotting.COLORS[0] if name == CHOSEN else plotting.QUIET for name in values]
    plotting.bars(axes, list(values), [value or 0.0 for value in values.values()], texts, colors)
