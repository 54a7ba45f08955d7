"""What is left of the answers when each patch keeps a few words of its distribution.

ALIGN's visual token is an average of text embeddings, of which the likeliest few may say it all. So
the questions are answered with the k likeliest words of each patch alone, by the softmax over these
(`config.model.connector.top_k`), beside the part of the probability that they have. The control
keeps k random words in their place, likewise by the softmax over them: drawn for each patch of a
tile, the same in all tiles and for all questions, from the words that patches use
(`vocabulary.Usage.kept`). From all of a large vocabulary it would draw words of no probability, and
show less.
"""

import argparse
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from alignvlm_jax.analysis import base, blank_patches, vocabulary
from alignvlm_jax.analysis.base import Analysis
from alignvlm_jax.benchmarks.runner import Runner, Trial
from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import patch_tokens
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import vlm
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.pictures import plotting
from alignvlm_jax.shapes import Array, Bool, Float, Int

INCHES = (9.0, 3.8)
WIDE_INCHES = (13.0, 3.8)
KEPT = {"likeliest": "likeliest words", "random": "random words"}
"""The label of the curve of what patches keep."""


class Words(Analysis):
    """The analysis of the scores that the few likeliest words of each patch leave."""

    name = "words"
    title = "A few words a patch"
    needs_distribution = True

    def check(self, config: Config, args: argparse.Namespace) -> None:
        if not args.top_k:
            raise UserError("--top_k has no number; give some, for example --top_k=1,2,4,8")
        num_words = config.model.llm.unpadded_vocab_size
        if (most := max(args.top_k)) > num_words:
            raise UserError(f"--top_k has {most:,}; the vocabulary has {num_words:,} words")

    def measure(self, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
        return measure(
            loaded,
            args.split,
            args.pages,
            args.num_pages,
            threshold=args.threshold,
            top_k=args.top_k,
            seed=args.seed,
        )

    def show(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints a table with a row for each number of words."""
        titles = ("ANLS", "exact match", "probability")
        table = base.table("words kept", *titles, *(f"random: {title}" for title in titles))
        for point in found["points"]:
            table.add_row(f"{point['top_k']:,}", *_cells(point["likeliest"], point["random"]))
        everything = found["all"]
        table.add_row(f"all {found['num_words']:,}", *_cells(everything | {"mass": 1.0}))
        console.print(table)
        console.print(
            f"{everything['num_eval']:,} questions; the mean probability over "
            f"{found['num_patches']:,} patches. Random words are of the {found['num_used']:,} that "
            "patches use."
        )
        # Files of earlier versions have none.
        if blanks := found.get("blank_patches"):
            console.print(blank_patches.table(blanks))
            console.print(blank_patches.note(blanks))

    def picture(self, connector: str, found: Mapping[str, Any]) -> bytes:
        """Returns a PNG of the scores and the probability over the number of words."""

        def draw(figure: Figure) -> None:
            blanks = found.get("blank_patches")
            scores, masses, *others = figure.subplots(1, 3 if blanks else 2)
            _draw_curves(scores, found, "anls", found["all"]["anls"])
            scores.set_title("ANLS with these words alone")
            scores.legend()
            _draw_curves(masses, found, "mass", 1.0)
            masses.set_title("Their mean probability")
            for axes in others:
                blank_patches.draw(axes, blanks)
                axes.set_title("ANLS, blank patches dropped")

        inches = WIDE_INCHES if "blank_patches" in found else INCHES
        return plotting.png(inches, draw)

    def sentence(self, written: Mapping[str, Any]) -> str:
        first = written["points"][0]
        last = written["points"][-1]
        blanks = written.get("blank_patches")
        return (
            f"With {_likeliest(first['top_k'])} of each patch alone, which {_have(first['top_k'])} "
            f"{first['likeliest']['mass']:.1%} of its probability, the answers score ANLS "
            f"{first['likeliest']['anls']:.3f}, with {_likeliest(last['top_k'])} "
            f"{last['likeliest']['anls']:.3f}, with all {written['num_words']:,} "
            f"{written['all']['anls']:.3f}; with {last['top_k']:,} random ones of the "
            f"{written['num_used']:,} that patches use {last['random']['anls']:.3f}."
            f"{' ' + blank_patches.sentence(blanks) if blanks else ''}"
        )


ANALYSIS = Words()


def measure(
    loaded: Loaded,
    split: str,
    pages: str,
    num_pages: int,
    *,
    threshold: float,
    top_k: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Returns the scores with the likeliest and with random words of each patch, and with all.

    The result has a point for each number of words, in ascending order.

    Args:
      loaded: the model; its config gives the folder of the data and the number of questions.
      split: name of the split whose questions are used.
      pages: name of the split whose documents tell which words patches use, and how much of the
        probability the kept ones have.
      num_pages: number of its documents that are used, spread evenly.
      threshold: patches use a word if its mean probability is above it.
      top_k: how many words a patch keeps.
      seed: seed of the random words.

    Raises:
      UserError: the connector has no distribution over the vocabulary, a split is missing, or
        patches use fewer words than a patch shall keep.
    """
    patch_tokens.check(loaded.config.model)
    num_words = loaded.config.model.llm.unpadded_vocab_size
    used = vocabulary.usage(loaded, pages, num_pages).kept("mean", threshold)[:num_words]
    drawn = draw(used, loaded.config.model.vision.num_patches, max(top_k), seed)
    num_patches, masses = mean_masses(loaded, vocabulary.tiles_of(loaded, pages, num_pages), drawn)
    # Also of a model that was trained with few: all are what its patches would have without.
    whole = with_top_k(loaded, 0)
    evaluator = Runner(whole)
    points = []
    for k in sorted(set(top_k)):
        few = Runner(with_top_k(loaded, k))
        # Of one shape for every k: one compiled program.
        random = np.where(np.arange(drawn.shape[1]) < k, drawn, -1)
        header = {"random_words": k, "seed": seed, "drawn_crc32": zlib.crc32(random.tobytes())}
        scores = {
            "likeliest": _scores(few, loaded, split, f"top_{k}", {"top_k": k}, {}),
            "random": _scores(evaluator, loaded, split, f"random_{k}", header, vlm.keeping(random)),
        }
        points.append(
            {"top_k": k}
            | {kept: {"mass": float(masses[kept][k - 1])} | scores[kept] for kept in KEPT}
        )
    everything = _scores(evaluator, loaded, split, "all", {"top_k": 0}, {})
    return {
        "num_words": num_words,
        "num_used": int(used.sum()),
        "num_patches": num_patches,
        "points": points,
        "all": everything,
        "blank_patches": blank_patches.measure(whole, split, evaluator, everything),
    }


def with_top_k(loaded: Loaded, top_k: int) -> Loaded:
    """Returns the model whose patches keep their `top_k` likeliest words; 0: all."""
    connector = dataclasses.replace(loaded.config.model.connector, top_k=top_k)
    model = dataclasses.replace(loaded.config.model, connector=connector)
    config = dataclasses.replace(loaded.config, model=model)
    return dataclasses.replace(loaded, config=config, model=VLM(model))


def draw(used: Bool[np.ndarray, "V"], num_patches: int, count: int, seed: int) -> np.ndarray:
    """Returns `count` different words of those used for each patch of a tile, int32 [P, count]; the
    first k of them are the draw of k.

    Raises:
      UserError: fewer are used.
    """
    ids = np.flatnonzero(used)
    if len(ids) < count:
        raise UserError(
            f"--top_k has {count:,}, and patches use {len(ids):,} words above --threshold: lower "
            "one of them"
        )
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(ids, count, replace=False) for _ in range(num_patches)]
    return np.stack(drawn).astype(np.int32)


def mean_masses(
    loaded: Loaded, tiles: np.ndarray, drawn: Int[np.ndarray, "P k"]
) -> tuple[int, dict[str, Float[np.ndarray, "k"]]]:
    """Returns the number of patches, and the mean over them of the probability that the likeliest
    1, 2, ... words have, and the first 1, 2, ... of those drawn."""
    rows = {"tiles": tiles, "drawn": np.broadcast_to(drawn, (len(tiles), *drawn.shape))}
    parts = list(tiles_lib.map_tiles(loaded, _tile_probabilities, rows))
    num_patches = len(tiles) * len(drawn)
    # [tiles, k] of each: sums over a tile's patches, in float64 from here on.
    sums = [np.float64(np.concatenate(one)).sum(0) for one in zip(*parts, strict=True)]
    return num_patches, {
        kept: np.cumsum(total) / num_patches for kept, total in zip(KEPT, sums, strict=True)
    }


def _tile_probabilities(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> tuple[Float[Array, "B k"], Float[Array, "B k"]]:
    """Returns the probabilities of the likeliest words, by rank, and of those drawn, each summed
    over the patches of a tile."""
    # [B, I, P, V] with I = 1: `map_tiles` gives each tile a row of its own.
    p_BPV = model.apply(variables, batch, method="patch_probabilities")[:, 0]
    likeliest_BPk, _ = jax.lax.top_k(p_BPV, batch["drawn"].shape[-1])
    drawn_BPk = jnp.take_along_axis(p_BPV, batch["drawn"], axis=-1)
    return likeliest_BPk.sum(1), drawn_BPk.sum(1)


def _scores(
    evaluator: Runner,
    loaded: Loaded,
    split: str,
    name: str,
    header: Mapping[str, Any],
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the scores of a trial, whose predictions are kept in analysis/words/ of the
    workdir."""
    path = base.folder(loaded) / "words" / f"{split}_{name}.jsonl"
    trial = Trial(path, header, variables=variables)
    return base.scores(evaluator.evaluate_trial(split, trial, f"{split}, {name.replace('_', ' ')}"))


def _cells(*kept: Mapping[str, Any]) -> list[str]:
    """Returns the cells of a row of the table for each choice of words."""
    return [
        cell
        for one in kept
        for cell in (f"{one['anls']:.4f}", f"{one['exact_match']:.4f}", f"{one['mass']:.4f}")
    ]


def _likeliest(count: int) -> str:
    return "the likeliest word" if count == 1 else f"the {count:,} likeliest words"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _draw_curves(axes: Axes, found: Mapping[str, Any], field: str, of_all: float) -> None:
    """Draws a field of the points over the number of words, with that of all as a line."""
    counts = [point["top_k"] for point in found["points"]]
    # At equal distances: numbers of words are usually doubled.
    for number, (kept, label) in enumerate(KEPT.items()):
        values = [point[kept][field] for point in found["points"]]
        axes.plot(
            range(len(counts)),
            values,
            marker="o",
            markersize=4,
            linewidth=1.6,
            color=plotting.color(number),
            label=label,
        )
    label = f"all {found['num_words']:,} words"
    axes.axhline(of_all, color="#1c2127", linewidth=1, linestyle=":", label=label)
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set_xlabel("words a patch keeps")
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y")
