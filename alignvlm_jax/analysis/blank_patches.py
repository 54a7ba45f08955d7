"""What is left of the answers when blank patches are dropped: of a run of them in a row of a tile,
the visual token of one alone reaches the language model.

Which are blank is told by pixels, as `data.blank_contrast` has it, or by the patches themselves,
where their likeliest token is the space by far. The latter costs a pass over the page before its
prompt can be made, which is no part of the times here.
"""

import dataclasses
import functools
import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from alignvlm_jax.analysis import base
from alignvlm_jax.analysis.cost import MAX_SPREAD, NO_END
from alignvlm_jax.benchmarks.questions import Question, choose_questions
from alignvlm_jax.benchmarks.runner import Runner, Trial
from alignvlm_jax.data import loader, sequences, shards, tiling
from alignvlm_jax.data.examples import ExampleBuilder
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.data.tiling import KeptPatches
from alignvlm_jax.inference import batching
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import sharding
from alignvlm_jax.pictures import plotting
from alignvlm_jax.shapes import Array, Bool, Float, UInt8

CONTRAST = 24
"""Levels of `data.blank_contrast`, of a model that was trained with all patches."""
MIN_SPACE = 0.5
"""Probability of the space token above which a patch says that it is blank."""
TURNS = 5
LABELS = {"none": "none", "pixels": "by pixels", "patches": "by what they say"}
"""By the name of what tells blank patches."""


def measure(loaded: Loaded, split: str, evaluator: Runner, own: Mapping[str, Any]) -> dict:
    """Returns scores, seconds of an answer and the fraction of visual tokens that stay, where no
    blank patches are dropped and where they are.

    A model that was trained without them has no point for all patches.

    Args:
      loaded: the model; its config gives the folder of the data and the number of questions.
      split: name of the split whose questions are used.
      evaluator: of this model.
      own: the scores of these questions with the patches that the model's config keeps.
    """
    config = loaded.config
    records = shards.RecordSource(config.data.dir, split)
    questions = choose_questions(records, config.eval.num_questions)
    # Several questions may be about one page, whose patches count once.
    pages = [records[number] for number in sorted({one.record for one in questions})]
    tiles = [page.pixels for record in pages for page in loaded.builder.tile_pages(record)]
    contrast = config.data.blank_contrast or CONTRAST
    data = dataclasses.replace(config.data, blank_contrast=contrast)
    choices: dict[str, KeptPatches] = {
        "none": lambda pixels: np.ones((len(pixels), config.model.vision.num_patches), bool),
        "pixels": lambda pixels: tiling.kept_patches(pixels, config.model.vision, data),
        "patches": by_what_they_say(loaded, tiles),
    }
    # What a model has never seen, full rows of blank patches, would say little of it; and a page
    # might not fit `data.seq_len` with all.
    trained_on = "pixels" if config.data.blank_contrast else "none"
    if trained_on == "pixels":
        del choices["none"]
    points = []
    for name, keep in choices.items():
        # What another choice of patches answered must not be taken for this one's.
        header = {"blank_patches": name, "contrast": contrast, "min_space": MIN_SPACE}
        path = base.folder(loaded) / "words" / f"{split}_blank_{name}.jsonl"
        trial = Trial(path, header, keep=keep)
        title = f"{split}, blank patches dropped {LABELS[name]}"
        scores = (
            own
            if name == trained_on
            else base.scores(evaluator.evaluate_trial(split, trial, title))
        )
        kept = np.concatenate([keep(pixels) for pixels in tiles])
        points.append({"dropped": name, "kept": float(kept.mean()), **scores})
    # Apart from the answers: those of an earlier run are not made again, and end at different
    # lengths.
    size = batching.batch_size(len(questions), config.eval.batch_size, loaded.data_parallel_size)
    prompts = [
        _prompts(dataclasses.replace(loaded.builder, keep=keep), records, questions, loaded, size)
        for keep in choices.values()
    ]
    seconds, spread = _seconds(loaded, prompts, size)
    for point, each in zip(points, seconds, strict=True):
        point["seconds"] = each
    return {
        "contrast": contrast,
        "min_space": MIN_SPACE,
        "num_pages": len(pages),
        "trained_on": trained_on,
        "time_spread": spread,
        "points": points,
    }


def by_what_they_say(loaded: Loaded, pages: Iterable[UInt8[np.ndarray, "n Y X C"]]) -> KeptPatches:
    """Returns the choice of patches of which only one of a run says that it is blank; of the tiles
    of these pages, of which all processes ask the model together."""
    space = _space_probability(loaded.tokenizer.space_id)
    tiles = np.concatenate(list(pages))
    found = np.concatenate(list(tiles_lib.map_tiles(loaded, space, {"tiles": tiles})))
    kept = tiling.one_of_a_run(found > MIN_SPACE, loaded.config.model.vision)
    # By its pixels: a builder asks by page, and knows no number of a tile. 16 bytes of a digest do
    # not meet by chance.
    known = dict(zip(map(_digest, tiles), kept, strict=True))

    # Looked up: prompts are built by one process or another, and a pass over a page needs all.
    def keep(pixels: UInt8[np.ndarray, "n Y X C"]) -> Bool[np.ndarray, "n P"]:
        none = np.zeros((0, loaded.config.model.vision.num_patches), bool)
        return np.stack([known[_digest(tile)] for tile in pixels]) if len(pixels) else none

    return keep


def _digest(tile: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(tile), digest_size=16).digest()


# One function for each token: what it compiles to is kept by the function itself.
@functools.lru_cache
def _space_probability(space_id: int) -> Callable[..., Float[Array, "B P"]]:
    def apply(model: VLM, variables: Mapping, batch: Mapping[str, Array]) -> Float[Array, "B P"]:
        # A row is a sequence of one tile: [B, 1, P, V] -> [B, P].
        return model.apply(variables, batch, method="patch_probabilities")[:, 0, :, space_id]

    return apply


def _prompts(
    builder: ExampleBuilder,
    records: shards.RecordSource,
    questions: Sequence[Question],
    loaded: Loaded,
    size: int,
) -> PackedSequence:
    """The prompts of a batch of the first questions, of which this process feeds some rows."""
    rows = [questions[row % len(questions)] for row in range(size)]
    prompts = [builder.prompt(records[one.record], one.chat_turn(), one.before) for one in rows]
    # To the token: rounded up, two choices could cost the same.
    extent = builder.extent(prompts, multiple=1)
    trimmed = [sequences.trim(prompt, *extent) for prompt in prompts]
    # All of them are built here, though a process feeds some: the longest decides the shape of all.
    local_rows = sharding.rows_of_process(loaded.mesh, size).tolist()
    return loader.stack([trimmed[row] for row in local_rows])


def _seconds(
    loaded: Loaded, batches: Sequence[PackedSequence], size: int
) -> tuple[list[float], float]:
    """Returns the least seconds of an answer of the largest length in each batch of prompts, of
    which all processes have `size` rows together; and the largest fraction by which the median of
    its turns was above it."""
    sampler = loaded.sampler(end_ids=NO_END)
    most = loaded.config.eval.max_new_tokens
    times: list[list[float]] = [[] for _ in batches]
    # One turn more, which compiles.
    # In turns: what else the machine does meets all alike.
    for _ in tiles_lib.track(range(TURNS + 1), "turns"):
        for batch, of_batch in zip(batches, times, strict=True):
            began = time.perf_counter()
            sampler.generate(loaded.variables, batch, most)
            of_batch.append(time.perf_counter() - began)
    least = [min(of_batch[1:]) for of_batch in times]
    medians = [statistics.median(of_batch[1:]) for of_batch in times]
    spread = max(median / one - 1 for median, one in zip(medians, least, strict=True))
    return [one / size for one in least], spread


def table(found: Mapping[str, Any]) -> Table:
    """Returns a table with a row for each way to tell blank patches."""
    titles = [
        "ANLS",
        "exact match",
        "visual tokens",
        *(["ms an answer"] if _is_timed(found) else []),
    ]
    made = base.table("blank patches dropped", *titles)
    for point in found["points"]:
        cells = [f"{point['anls']:.4f}", f"{point['exact_match']:.4f}", f"{point['kept']:.1%}"]
        cells += [f"{1e3 * point['seconds']:.1f}"] if _is_timed(found) else []
        made.add_row(LABELS[point["dropped"]], *cells)
    return made


def note(found: Mapping[str, Any]) -> str:
    """Returns what stands under the table."""
    text = (
        f"Of a run of blank patches one stays. By pixels: they differ by less than "
        f"{found['contrast']} levels; by what they say: the space is above {found['min_space']}. "
    )
    text += (
        "The model was trained with all patches."
        if found["trained_on"] == "none"
        else "The model was trained without those that are blank by pixels, and is not asked with "
        "all."
    )
    spread = f"{found['time_spread']:.0%}"
    if _is_timed(found):
        return f"{text} Times are the least of {TURNS} turns, the median up to {spread} above it."
    return f"{text} Times differed by {spread} between turns, and are left out."


def sentence(found: Mapping[str, Any]) -> str:
    """Returns a sentence with the scores and the visual tokens that stay."""
    # With the tokens beside each score: neither means anything without the other.
    parts = [
        f"{point['anls']:.3f} with {point['kept']:.0%} of the visual tokens"
        + ("" if point["dropped"] == "none" else f", blank ones dropped {LABELS[point['dropped']]}")
        for point in found["points"]
    ]
    trained = "all" if found["trained_on"] == "none" else "those that are not blank by pixels"
    return f"Trained with {trained}, it scores ANLS {'; '.join(parts)}."


def draw(axes: Axes, found: Mapping[str, Any]) -> None:
    """Draws the ANLS of each way as a bar, with the fraction of visual tokens that stays."""
    points = found["points"]
    # The way that the model was trained in stands out, as it does among connectors in `cost`.
    names = [LABELS[point["dropped"]] for point in points]
    texts = [f"{point['anls']:.3f}, {point['kept']:.0%} of tokens" for point in points]
    colors = [
        plotting.COLORS[0] if point["dropped"] == found["trained_on"] else plotting.QUIET
        for point in points
    ]
    plotting.bars(axes, names, [point["anls"] for point in points], texts, colors)


def _is_timed(found: Mapping[str, Any]) -> bool:
    # As of connectors in `cost`: beyond it times are no property of the model.
    return found["time_spread"] <= MAX_SPREAD
