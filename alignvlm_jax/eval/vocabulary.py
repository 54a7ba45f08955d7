"""Which words ALIGN's patches use (arXiv 2502.01341, section 5.3): their mean distribution, how sharp each patch's own
is, and what is left of the scores when the words that hardly any patch uses are taken away.

A dense mean says nothing of a patch: a thousand patches, each certain of another word, have a flat mean. So the entropy
of each patch stands beside that of the mean. The paper names 3.4K words above 1e-6 without saying of what; here both
the mean over patches and the largest of them choose. Patches of a tile's padding count: the LLM is given them too.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from alignvlm_jax.data import sources
from alignvlm_jax.data.tokenizer import Tokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import analysis, looking
from alignvlm_jax.eval.loading import Loaded
from alignvlm_jax.eval.runner import Runner, Trial
from alignvlm_jax.models import vlm
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.shapes import Array, Float, Int

NUM_TOP = 20
NUM_BINS = 40


class TileWords(NamedTuple):
    """Of each tile's patches: the sum and the largest of their distributions, and of each patch the entropy in bits and
    the likeliest word."""

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
                f"--threshold {threshold:g} leaves no word: the largest {by} is {getattr(self, by).max():g}"
            )
        return kept

    def facts(self) -> dict[str, Any]:
        """Returns the numbers that describe it; entropies in bits, perplexities in words."""
        most = np.log2(len(self.mean))
        counts, edges = np.histogram(self.entropies.clip(0, most), NUM_BINS, (0, most))
        return {
            "num_patches": len(self.entropies),
            "entropy": analysis.quantiles(self.entropies),
            "entropy_histogram": {"edges": edges.round(4).tolist(), "patches": counts.tolist()},
            "perplexity": analysis.quantiles(2**self.entropies),
            "mean_perplexity": float(2 ** entropy(self.mean)),
            "mean_peak": float(self.mean.max()),
        }

    def top_words(self, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        """Returns the words of the largest mean, each with the share of patches that it is the likeliest in."""
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


def measure(loaded: Loaded, split: str, pages: str, num_pages: int, threshold: float) -> dict[str, Any]:
    """Returns how the pages use the vocabulary, and the scores on a split with all words and with those kept.

    Args:
      loaded: the model; its config says where the splits are and how many questions are asked.
      split: whose questions are asked.
      pages: split whose documents choose the words; another one than `split`, for a test that could fail.
      num_pages: documents of it, spread evenly.
      threshold: a word is kept above it.

    Raises:
      UserError: the connector has no distribution over words, a split is missing, or no word is kept.
    """
    looking.check(loaded.config)
    found = usage(loaded, pages, num_pages)
    kept = {by: found.kept(by, threshold) for by in ("mean", "highest")}
    everything = np.ones_like(kept["mean"])
    trials = {"all": everything} | kept
    asker = Runner(loaded, loaded.config)
    return {
        **found.facts(),
        "top_words": found.top_words(loaded.tokenizer),
        "pruning": [{"words": name} | ask(asker, loaded, split, words) for name, words in trials.items()],
    }


def usage(loaded: Loaded, split: str, num_pages: int) -> Usage:
    """Returns how the patches of at most `num_pages` documents of a split use the vocabulary."""
    records = sources.RecordSource(loaded.config.data.dir, split)
    count = min(num_pages, len(records))
    tiles = analysis.tiles_of(loaded, [records[i * len(records) // count] for i in range(count)])
    vocab_size = loaded.config.model.llm.vocab_size
    total, highest, top_counts = np.zeros(vocab_size), np.zeros(vocab_size), np.zeros(vocab_size, int)
    entropies = []
    for part in analysis.map_tiles(loaded, _tile_words, {"tiles": tiles}):
        total += np.float64(part.total).sum(0)
        highest = np.maximum(highest, part.highest.max(0))
        top_counts += np.bincount(part.top.reshape(-1), minlength=vocab_size)
        entropies.append(np.float64(part.entropy).reshape(-1))
    entropies = np.concatenate(entropies)
    return Usage(total / len(entropies), highest, entropies, top_counts)


def ask(asker: Runner, loaded: Loaded, split: str, words: np.ndarray) -> dict[str, Any]:
    """Returns the scores on a split of the model whose patches have only these words, bool [V]; the softmax is over
    them alone. The answers stay in analysis/vocabulary/ of the workdir."""
    code = zlib.crc32(np.packbits(words).tobytes())
    path = analysis.folder(loaded) / "vocabulary" / f"{split}_{words.sum()}_words_{code:08x}.jsonl"
    header = {"kept_words": int(words.sum()), "kept_words_crc32": code}
    trial = Trial(path, header, variables=vlm.pruning(words))
    result = asker.evaluate_trial(split, trial, f"{split}, {words.sum():,} words")
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
