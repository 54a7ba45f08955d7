"""How much disturbance a connector bears (arXiv 2502.01341, section 5.4).

The paper adds Gaussian noise to the features just before the connector; here the page's pixels may
be disturbed too, or its content moved. Two things are measured: the scores of the answers, and how
far the connector's output moves, as a cosine distance. That distance alone deceives: where all
patches share a large mean vector, which a flat softmax over a vocabulary gives, it is small because
*every* distance is. So beside it stands the distance between different patches without noise, and
both once more after that mean is taken off. Of content that moved there are no distances: a patch
then shows something else.

The paper's noise has sigma 3 on features whose scale it does not tell. Sigmas are therefore also
given in units of the features' standard deviation, which compare between models; so are shifts in
patches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignvlm_jax.analysis import base, perturbation
from alignvlm_jax.analysis.perturbation import Disturbance, FeatureNoise, PixelNoise, Shift
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.benchmarks.questions import Question, choose_questions
from alignvlm_jax.benchmarks.runner import Runner, Trial
from alignvlm_jax.data import images, shards
from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.pictures import plotting


def measure(
    loaded: Loaded,
    split: str,
    sigmas: Sequence[float],
    relative_sigmas: Sequence[float],
    num_pages: int,
    seed: int,
) -> dict[str, Any]:
    """Returns what noise on the features does: points, the first without noise, in the order of
    their sigmas, and what they are compared with.

    A point has the scores, and the mean `distance` of visual tokens with and without noise;
    `centred_distance` with the mean token of the clean pages taken off both.

    Args:
      loaded: the model; its config says where the split is and how many questions are asked.
      split: of the documents.
      sigmas: of the noise, in the unit of the features.
      relative_sigmas: in units of `feature_std`.
      num_pages: documents, of those asked about, whose features and visual tokens are compared.
      seed: of the noise.

    Raises:
      UserError: the split is missing, has no questions or no images.
    """
    pages = pages_asked_about(loaded, split)[:num_pages]
    feature_std = perturbation.feature_std(loaded, pages)
    sizes = sorted({0.0, *sigmas, *(relative * feature_std for relative in relative_sigmas)})
    trials = [FeatureNoise(sigma, seed) for sigma in sizes]
    points = [{"sigma": sigma, "relative_sigma": sigma / feature_std} for sigma in sizes]
    between, moved = perturbation.measure(loaded, pages, trials)
    return {
        "feature_std": feature_std,
        "num_pages": len(pages),
        **between,
        "points": _merge(points, _scores(loaded, split, trials), moved),
    }


def measure_pixels(
    loaded: Loaded, split: str, sigmas: Sequence[float], num_pages: int, seed: int
) -> dict[str, Any]:
    """Returns what noise on the pixels does, as `measure` does; sigmas are in units of the range
    from black to white.

    Raises:
      UserError: the split is missing, has no questions or no images.
    """
    pages = pages_asked_about(loaded, split)[:num_pages]
    sizes = sorted({0.0, *sigmas})
    trials = [_none(seed), *(PixelNoise(sigma, seed) for sigma in sizes[1:])]
    between, moved = perturbation.measure(loaded, pages, trials)
    return {
        "kind": "pixels",
        "num_pages": len(pages),
        **between,
        "points": _merge(
            [{"sigma": sigma} for sigma in sizes], _scores(loaded, split, trials), moved
        ),
    }


def measure_layout(
    loaded: Loaded, split: str, shifts: Sequence[int], relative_shifts: Sequence[float], seed: int
) -> dict[str, Any]:
    """Returns what moving the content of pages does: the scores at shifts of at most so many
    pixels, the first 0.

    Args:
      loaded: as for `measure`.
      split: of the documents.
      shifts: in pixels of the page.
      relative_shifts: in units of `patch_pixels`, the shorter side of a patch where it lies on the
        page; rounded to pixels, 1 at least.
      seed: of the shifts.

    Raises:
      UserError: the split is missing, has no questions or no images.
    """
    side = patch_side(loaded, pages_asked_about(loaded, split))
    sizes = sorted({0, *shifts, *(max(1, round(relative * side)) for relative in relative_shifts)})
    trials = [_none(seed), *(Shift(shift, seed) for shift in sizes[1:])]
    points = [{"shift": shift, "relative_shift": shift / side} for shift in sizes]
    return {
        "kind": "layout",
        "patch_pixels": side,
        "points": _merge(points, _scores(loaded, split, trials)),
    }


def pages_asked_about(loaded: Loaded, split: str) -> list[Record]:
    """Returns the documents of a split that its questions are about, in their order.

    Raises:
      UserError: the split is missing or has no questions.
    """
    records = shards.RecordSource(loaded.config.data.dir, split)
    questions = choose_questions(records, loaded.config.eval.num_questions)
    if not questions:
        raise UserError(f"split {split!r} in {loaded.config.data.dir} has no questions")
    return [records[index] for index in sorted({question.record for question in questions})]


def ask(evaluator: Runner, loaded: Loaded, split: str, disturbance: Disturbance) -> Predictions:
    """Returns the answers to a split's questions, disturbed; they stay in analysis/noise/ of the
    workdir."""

    def inputs(question: Question) -> dict[str, np.ndarray]:
        return disturbance.inputs(question.id)

    path = base.folder(loaded) / "noise" / f"{split}_{disturbance.file}.jsonl"
    trial = Trial(path, {"noise": disturbance.header()}, page=disturbance.page, inputs=inputs)
    return evaluator.evaluate_trial(split, trial, f"{split}, {disturbance.file.replace('_', ' ')}")


def patch_side(loaded: Loaded, pages: Sequence[Record]) -> float:
    """Returns the shorter side of a patch in pixels of the page, of pages of many sizes the median.

    Raises:
      UserError: an image cannot be read, or there is none.
    """
    vision = loaded.config.model.vision
    data = loaded.config.data
    patch = np.array([vision.patch_width, vision.patch_height])
    sides = []
    for record in pages:
        for image in record.images:
            page = images.decode_image(image, record.id)
            most = data.tiles_of_a_record // len(record.images)
            scales = images.tile_image(page, vision, most, data.use_overview).scales
            sides.append((patch / scales[-1]).min())  # The overview, if any, is the first.
    if not sides:
        raise UserError("the chosen records have no images")
    return float(np.median(sides))


def _none(seed: int) -> Disturbance:
    """No disturbance: of whatever kind, its answers are one file."""
    return FeatureNoise(0.0, seed)


def _scores(loaded: Loaded, split: str, trials: Sequence[Disturbance]) -> list[dict[str, Any]]:
    evaluator = Runner(loaded)
    results = [ask(evaluator, loaded, split, trial) for trial in trials]
    return [
        {
            "anls": result.mean("score"),
            "exact_match": result.mean("exact"),
            "num_eval": len(result.rows),
        }
        for result in results
    ]


def _merge(*parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points of which each part has some fields."""
    return [
        {name: value for part in point for name, value in part.items()}
        for point in zip(*parts, strict=True)
    ]


INCHES = (5.0, 3.8)
"""Of a panel."""

AXES = {
    "features": ("relative_sigma", "noise, standard deviations of the features"),
    "pixels": ("sigma", "noise on pixels, fraction of the range from black to white"),
    "layout": ("relative_shift", "content moved by at most, patches of {patch_pixels:.3g} pixels"),
}
"""By kind of disturbance: the field of a point that the curves are over, and what it is; braces
name results."""


def picture(results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns a PNG of results of one kind by name, over the size of the disturbance: ANLS, and, of
    kinds with distances, how far visual tokens move with the mean removed, as a fraction of the
    distance between different ones."""
    first = next(iter(results.values()))
    field, label = AXES[first.get("kind", "features")]
    with_distances = "centred_between_distance" in first

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 1 + with_distances, squeeze=False)[0]
        _draw_scores(panels[0], results, field)
        if with_distances:
            _draw_distances(panels[1], results, field)
        for axes in panels:
            axes.set_xlabel(label.format(**first))
            axes.grid(axis="y")

    return plotting.png((INCHES[0] * (1 + with_distances), INCHES[1]), draw)


def _draw_scores(axes: Axes, results: Mapping[str, Mapping[str, Any]], field: str) -> None:
    for number, (name, found) in enumerate(results.items()):
        _draw_curve(axes, number, name, found, field, [point["anls"] for point in found["points"]])
    axes.set_title("ANLS")
    axes.set_ylim(0, 1.02)
    axes.legend()


def _draw_distances(axes: Axes, results: Mapping[str, Mapping[str, Any]], field: str) -> None:
    for number, (name, found) in enumerate(results.items()):
        between = found["centred_between_distance"]
        _draw_curve(
            axes,
            number,
            name,
            found,
            field,
            [point["centred_distance"] / between for point in found["points"]],
        )
    axes.set_title("Movement of visual tokens / distance between them")
    # At 1 a token is as far from itself as it is from any other.
    axes.axhline(1, color="#00000066", linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)


def _draw_curve(
    axes: Axes, number: int, name: str, found: Mapping[str, Any], field: str, values: list[float]
) -> None:
    sizes = [point[field] for point in found["points"]]
    axes.plot(
        sizes,
        values,
        color=plotting.color(number),
        marker="o",
        markersize=4,
        linewidth=1.6,
        label=name,
    )
