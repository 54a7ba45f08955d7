"""Usage of the vocabulary by ALIGN's patches (arXiv 2502.01341, section 5.3).

The analysis measures the mean of the patches' distributions, the entropy of each of them, and the
scores that remain when the tokens that hardly any patch uses are removed.

A dense mean says nothing about a single patch: a thousand patches, each certain of another token,
have a flat mean. So the entropy of each patch is measured beside that of the mean. The paper has
3.4K tokens above 1e-6 without saying which probability it means; here tokens are chosen both by
their mean over patches and by their largest value. Patches in a tile's padding count, because the
LLM is given them too.
"""

import argparse
import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.markup import escape

from alignvlm_jax.analysis import base
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.benchmarks.runner import Runner, Trial
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
INCHES = (10.0, 5.2)
TRIALS = {"all": "all {:,} words", "mean": "{:,} by their mean", "highest": "{:,} by their highest"}
"""The label of the bar of each trial, by what chose the tokens that it keeps."""


class Vocabulary(Analysis):
    """The analysis of how patches use the vocabulary, and of the scores with only these tokens."""

    name = "vocabulary"
    title = "Words that patches use"
    needs_distribution = True

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure(loaded, args.split, args.pages, args.num_pages, args.threshold)

    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints the entropy of patches, their top tokens, and the scores with fewer tokens."""
        table = base.table(f"{found['num_patches']:,} patches", "mean", "5 %", "50 %", "95 %")
        for name, unit in (("entropy", "bits"), ("perplexity", "words")):
            table.add_row(f"{name}, {unit}", *(f"{value:.2f}" for value in found[name].values()))
        console.print(table)
        console.print(
            f"Their mean distribution: perplexity {found['mean_perplexity']:.1f} words, peak "
            f"{found['mean_peak']:.4f}\n"
        )
        table = base.table("word", "mean", "likeliest in")
        for top in found["top_words"]:
            # Escaped: rich takes a token like [b] for markup.
            row = (escape(top["token"]), f"{top['mean']:.4f}", f"{top['share_of_patches']:.1%}")
            table.add_row(*row)
        console.print(table)
        table = base.table("words kept", "number", "ANLS", "exact match", "questions")
        for trial in found["pruning"]:
            scores = (f"{trial['anls']:.4f}", f"{trial['exact_match']:.4f}")
            count = f"{trial['num_words']:,}"
            table.add_row(trial["words"], count, *scores, f"{trial['num_eval']:,}")
        console.print()
        console.print(table)

    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of top tokens, the entropy of patches, and the scores with fewer tokens."""

        def draw(figure: Figure) -> None:
            left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
            _draw_tokens(left.add_subplot(), found)
            entropies, scores = right.subplots(2, 1, height_ratios=(1.6, 1))
            _draw_entropies(entropies, found)
            _draw_scores(scores, found)

        return plotting.png(INCHES, draw)

    def sentence(self, written: Mapping[str, Any]) -> str:
        everything, by_mean, _ = written["pruning"]
        return (
            f"A patch's distribution has the perplexity of {written['perplexity']['p50']:.1f} "
            f"words (median), the mean of all that of {written['mean_perplexity']:.1f}; with the "
            f"{by_mean['num_words']:,} words alone whose mean is above "
            f"{written['settings']['threshold']:g} the answers score ANLS {by_mean['anls']:.3f}, "
            f"with all {everything['num_words']:,} {everything['anls']:.3f}."
        )


ANALYSIS = Vocabulary()


class TileUsage(NamedTuple):
    """The distributions over the vocabulary of the patches of B tiles, summarised.

    Attributes:
      total: sum over the patches of a tile.
      highest: largest probability of each token in a patch of the tile.
      entropy: entropy of each patch in bits.
      top: likeliest token of each patch.
    """

    total: Float[Array, "B V"]
    highest: Float[Array, "B V"]
    entropy: Float[Array, "B P"]
    top: Int[Array, "B P"]


@dataclasses.dataclass(frozen=True)
class Usage:
    """The usage of the vocabulary by n patches.

    Attributes:
      mean: mean of their distributions, float64 [V].
      highest: largest probability of each token in a patch, float64 [V].
      entropies: entropy of each patch in bits, float64 [n].
      top_counts: number of patches in which each token is the likeliest, int [V].
    """

    mean: np.ndarray
    highest: np.ndarray
    entropies: np.ndarray
    top_counts: np.ndarray

    def kept(self, by: str, threshold: float) -> np.ndarray:
        """Returns whether each token has a probability above `threshold`, bool [V].

        Args:
          by: the probability that counts, "mean" or "highest".
          threshold: the probability above which a token is kept.

        Raises:
          UserError: no token is kept.
        """
        kept = getattr(self, by) > threshold
        if not kept.any():
            raise UserError(
                f"--threshold {threshold:g} leaves no word: the largest {by} is "
                f"{getattr(self, by).max():g}"
            )
        return kept

    def facts(self) -> dict[str, Any]:
        """Returns numbers that describe the usage; entropies in bits, perplexities in tokens."""
        # Rounding leaves an entropy a little below 0, or above that of all tokens alike.
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

    def top_tokens(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Returns the `NUM_TOP` tokens with the largest mean, largest first.

        Each has the fraction of patches in which it is the likeliest.
        """
        # Stable: of equal means the lower id comes first, on every machine.
        ids = np.argsort(-self.mean, kind="stable")[:NUM_TOP].tolist()
        return [
            {
                "id": token_id,
                "token": tokenizer.piece(token_id),
                "mean": float(self.mean[token_id]),
                "share_of_patches": float(self.top_counts[token_id] / len(self.entropies)),
            }
            for token_id in ids
        ]


def measure(
    loaded: Loaded, split: str, pages: str, num_pages: int, threshold: float
) -> dict[str, Any]:
    """Returns the usage of the vocabulary on some pages, and scores with all and with kept tokens.

    Args:
      loaded: the model; its config gives the folder of the data and the number of questions.
      split: name of the split whose questions are used.
      pages: name of the split whose documents choose the tokens. It should not be `split`, or the
        tokens would be chosen on the test questions' own pages.
      num_pages: number of its documents that are used, spread evenly.
      threshold: a token is kept if its probability is above it.

    Raises:
      UserError: the connector has no distribution over the vocabulary, a split is missing, or no
        token is kept.
    """
    patch_tokens.check(loaded.config.model)
    found = usage(loaded, pages, num_pages)
    kept = {by: found.kept(by, threshold) for by in ("mean", "highest")}
    # All tokens are a trial like the others, not a run without pruning: one compiled program.
    trials = {"all": np.ones_like(kept["mean"])} | kept
    evaluator = Runner(loaded)
    return {
        **found.facts(),
        "top_words": found.top_tokens(loaded.tokenizer),
        "pruning": [
            {"words": by} | predict(evaluator, loaded, split, tokens)
            for by, tokens in trials.items()
        ],
    }


def usage(loaded: Loaded, split: str, num_pages: int) -> Usage:
    """Returns the usage of the vocabulary by the patches of `num_pages` documents of a split."""
    tiles = tiles_of(loaded, split, num_pages)
    vocab_size = loaded.config.model.llm.vocab_size
    # A batch of tiles at a time, since the distributions [patches, V] of a single page take
    # gigabytes. Sums are float64: in float32 they would lose what a threshold of 1e-6 decides.
    total = np.zeros(vocab_size)
    highest = np.zeros(vocab_size)
    top_counts = np.zeros(vocab_size, int)
    entropies = []
    for part in tiles_lib.map_tiles(loaded, _tile_usage, {"tiles": tiles}):
        total += np.float64(part.total).sum(0)
        highest = np.maximum(highest, part.highest.max(0))
        top_counts += np.bincount(part.top.reshape(-1), minlength=vocab_size)
        entropies.append(np.float64(part.entropy).reshape(-1))
    entropies = np.concatenate(entropies)
    # An entropy for each patch: they are as many as the patches.
    return Usage(total / len(entropies), highest, entropies, top_counts)


def tiles_of(loaded: Loaded, split: str, num_pages: int) -> np.ndarray:
    """Returns the tiles of `num_pages` documents of a split, spread evenly, uint8 [n, Y, X, C]."""
    return tiles_lib.tiles_of(loaded, base.pages(loaded, split, num_pages))


def predict(evaluator: Runner, loaded: Loaded, split: str, kept: np.ndarray) -> dict[str, Any]:
    """Returns the scores on a split if the softmax of patches is over the kept tokens only.

    The predictions are kept in analysis/vocabulary/ of the workdir.

    Args:
      evaluator: the runner that generates the answers.
      loaded: the model.
      split: name of the split.
      kept: whether each token is kept, bool [V].
    """
    count = int(kept.sum())
    # In the name of the file, because another choice of as many tokens is another trial.
    code = zlib.crc32(np.packbits(kept).tobytes())
    path = base.folder(loaded) / "vocabulary" / f"{split}_{count}_words_{code:08x}.jsonl"
    header = {"kept_words": count, "kept_words_crc32": code}
    trial = Trial(path, header, variables=vlm.pruning(kept))
    result = evaluator.evaluate_trial(split, trial, f"{split}, {count:,} words")
    return {"num_words": count, **base.scores(result)}


# Of a single distribution numpy makes a number.
def entropy(p: Float[np.ndarray, "... V"]) -> Float[np.ndarray | np.floating, "..."]:
    """Returns the entropy of distributions in bits."""
    # 0 log 0 counts as 0: the logarithm of 1 stands in where p is 0.
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def _tile_usage(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> TileUsage:
    """Returns the usage of the vocabulary by each tile of a batch, on the device."""
    # [B, I, P, V] with I = 1: `map_tiles` gives each tile a row of its own.
    p_BPV = model.apply(variables, batch, method="patch_probabilities")[:, 0]
    # float32 is enough: with 100,000 tokens the error is far below a hundredth of a bit.
    bits_BP = -(p_BPV * jnp.log2(jnp.where(p_BPV > 0, p_BPV, 1.0))).sum(-1)
    # [B, P, V] -> [B, V], [B, V], [B, P], [B, P]: no distribution leaves the device.
    return TileUsage(p_BPV.sum(1), p_BPV.max(1), bits_BP, p_BPV.argmax(-1))


def _draw_tokens(axes: Axes, found: Mapping[str, Any]) -> None:
    top = found["top_words"]
    means = [one["mean"] for one in top]
    names = [plotting.legible(one["token"]) for one in top]
    colors = [plotting.COLORS[0]] * len(top)
    plotting.bars(axes, names, means, [f"{mean:.2g}" for mean in means], colors)
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
    # The label stands on the side of the line that has more room.
    is_left = of_mean > histogram["edges"][-1] / 2
    axes.annotate(
        "that of their mean", (of_mean, 0.93), (-4 if is_left else 4, 0),
        xycoords=axes.get_xaxis_transform(), textcoords="offset points", fontsize=9,
        ha="right" if is_left else "left", va="center",
    )  # fmt: skip


def _draw_scores(axes: Axes, found: Mapping[str, Any]) -> None:
    trials = found["pruning"]
    names = [TRIALS[trial["words"]].format(trial["num_words"]) for trial in trials]
    scores = [trial["anls"] for trial in trials]
    colors = [plotting.QUIET] + [plotting.COLORS[0]] * (len(trials) - 1)
    plotting.bars(axes, names, scores, [f"{score:.3f}" for score in scores], colors)
    axes.set_title("ANLS with these words alone")
