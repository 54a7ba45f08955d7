"""Which words ALIGN's patches use (arXiv 2502.01341, section 5.3): their mean distribution, how
sharp each patch's own is, and what is left of the scores when the words that hardly any patch uses
are taken away.

A dense mean says nothing of a patch: a thousand patches, each certain of another word, have a flat
mean. So the entropy of each patch stands beside that of the mean. The paper names 3.4K words above
1e-6 without saying of what; here both the mean over patches and the largest of them choose. Patches
of a tile's padding count: the LLM is given them too.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from alignvlm_jax.analysis import base
from alignvlm_jax.benchmarks.runner import Runner, Trial
from alignvlm_jax.data import shards
from alignvlm_jax.data.tokenizers.base import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import patch_tokens
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import vlm
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.pictures import plotting
from alignvlm_jax.shapes import Array, Float, Int

NUM_TOP = 20
NUM_BINS = 40


class TileWords(NamedTuple):
    """Of each tile's patches: the sum and the largest of their distributions, and of each patch the
    entropy in bits and the likeliest word."""

    total: Float[Array, "B V"]
    highest: Float[Array, "B V"]
    entropy: Float[Array, "B P"]
    top: Int[Array, "B P"]


@dataclasses.dataclass(frozen=True)
class Usage:
    """How patches use the vocabulary.

    Attributes:
      mean: of their distributions, float64 [V].
      highest: of each word its largest probability in a patch, float64 [V].
      entropies: of each patch, in bits.
      top_counts: of each word in how many patches it is the likeliest, int [V].
    """

    mean: np.ndarray
    highest: np.ndarray
    entropies: np.ndarray
    top_counts: np.ndarray

    def kept(self, by: str, threshold: float) -> np.ndarray:
        """Returns which words have more than `threshold`, bool [V]: of the "mean" or the "highest".

        Raises:
          UserError: no word has.
        """
        kept = getattr(self, by) > threshold
        if not kept.any():
            raise UserError(
                f"--threshold {threshold:g} leaves no word: the largest {by} is "
                f"{getattr(self, by).max():g}"
            )
        return kept

    def facts(self) -> dict[str, Any]:
        """Returns the numbers that describe it; entropies in bits, perplexities in words."""
        most = np.log2(len(self.mean))
        counts, edges = np.histogram(self.entropies.clip(0, most), NUM_BINS, (0, most))
        return {
            "num_patches": len(self.entropies),
            "entropy": base.quantiles(self.entropies),
            "entropy_histogram": {"edges": edges.round(4).tolist(), "patches": counts.tolist()},
            "perplexity": base.quantiles(2**self.entropies),
            "mean_perplexity": float(2 ** entropy(self.mean)),
            "mean_peak": float(self.mean.max()),
        }

    def top_words(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Returns the words of the largest mean, each with the fraction of patches that it is the
        likeliest in."""
        likeliest = np.argsort(-self.mean, kind="stable")[:NUM_TOP].tolist()
        return [
            {
                "id": word,
                "token": tokenizer.piece(word),
                "mean": float(self.mean[word]),
                "share_of_patches": float(self.top_counts[word] / len(self.entropies)),
            }
            for word in likeliest
        ]


def measure(
    loaded: Loaded, split: str, pages: str, num_pages: int, threshold: float
) -> dict[str, Any]:
    """Returns how the pages use the vocabulary, and the scores on a split with all words and with
    those kept.

    Args:
      loaded: the model; its config says where the splits are and how many questions are asked.
      split: whose questions are asked.
      pages: split whose documents choose the words; another one than `split`, for a test that could
        fail.
      num_pages: documents of it, spread evenly.
      threshold: a word is kept above it.

    Raises:
      UserError: the connector has no distribution over words, a split is missing, or no word is
        kept.
    """
    patch_tokens.check(loaded.config.model)
    found = usage(loaded, pages, num_pages)
    kept = {by: found.kept(by, threshold) for by in ("mean", "highest")}
    everything = np.ones_like(kept["mean"])
    trials = {"all": everything} | kept
    evaluator = Runner(loaded)
    return {
        **found.facts(),
        "top_words": found.top_words(loaded.tokenizer),
        "pruning": [
            {"words": name} | ask(evaluator, loaded, split, words) for name, words in trials.items()
        ],
    }


def usage(loaded: Loaded, split: str, num_pages: int) -> Usage:
    """Returns how the patches of at most `num_pages` documents of a split use the vocabulary."""
    records = shards.RecordSource(loaded.config.data.dir, split)
    count = min(num_pages, len(records))
    tiles = tiles_lib.tiles_of(loaded, [records[i * len(records) // count] for i in range(count)])
    vocab_size = loaded.config.model.llm.vocab_size
    total = np.zeros(vocab_size)
    highest = np.zeros(vocab_size)
    top_counts = np.zeros(vocab_size, int)
    entropies = []
    for part in tiles_lib.map_tiles(loaded, _tile_words, {"tiles": tiles}):
        total += np.float64(part.total).sum(0)
        highest = np.maximum(highest, part.highest.max(0))
        top_counts += np.bincount(part.top.reshape(-1), minlength=vocab_size)
        entropies.append(np.float64(part.entropy).reshape(-1))
    entropies = np.concatenate(entropies)
    return Usage(total / len(entropies), highest, entropies, top_counts)


def ask(evaluator: Runner, loaded: Loaded, split: str, words: np.ndarray) -> dict[str, Any]:
    """Returns the scores on a split of the model whose patches have only these words, bool [V]; the
    softmax is over them alone. The answers stay in analysis/vocabulary/ of the workdir."""
    code = zlib.crc32(np.packbits(words).tobytes())
    path = base.folder(loaded) / "vocabulary" / f"{split}_{words.sum()}_words_{code:08x}.jsonl"
    header = {"kept_words": int(words.sum()), "kept_words_crc32": code}
    trial = Trial(path, header, variables=vlm.pruning(words))
    result = evaluator.evaluate_trial(split, trial, f"{split}, {words.sum():,} words")
    return {
        "num_words": int(words.sum()),
        "anls": result.mean("score"),
        "exact_match": result.mean("exact"),
        "num_eval": len(result.rows),
    }


def entropy(p: np.ndarray) -> np.ndarray:
    """Returns the entropy of distributions [..., V] in bits."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def _tile_words(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> TileWords:
    p_BPV = model.apply(variables, batch, method="patch_probabilities")[:, 0]
    # float32: of 100,000 words, what is lost is far below a hundredth of a bit.
    bits_BP = -(p_BPV * jnp.log2(jnp.where(p_BPV > 0, p_BPV, 1.0))).sum(-1)
    return TileWords(p_BPV.sum(1), p_BPV.max(1), bits_BP, p_BPV.argmax(-1))


INCHES = (10.0, 5.2)
TRIALS = {"all": "all {:,} words", "mean": "{:,} by their mean", "highest": "{:,} by their highest"}
"""Their names, by what chose the words."""


def picture(found: Mapping[str, Any]) -> bytes:
    """Returns a PNG: the words of the largest mean, how sharp patches are, and the scores with some
    words alone."""

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
    plotting.bars(
        axes,
        [plotting.legible(word["token"]) for word in words],
        means,
        [f"{m:.2g}" for m in means],
        colors,
    )
    axes.set_title("Mean probability of a word")
    for label in axes.get_yticklabels():
        label.set(fontfamily="monospace", fontsize=10)


def _draw_entropies(axes: Axes, found: Mapping[str, Any]) -> None:
    histogram = found["entropy_histogram"]
    fractions = np.array(histogram["patches"]) / found["num_patches"]
    axes.stairs(fractions, histogram["edges"], fill=True, color=plotting.COLORS[0])
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
