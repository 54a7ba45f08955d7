"""Perturbations of a model's input, and the scores of the answers that are generated with them.

There are noise on the vision features, noise on the page's pixels, and moved content. A
perturbation depends on its seed and on the id of the question or the page alone. It has the same
direction at every size, so that a curve over sizes is smooth.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from alignvlm_jax.analysis import base
from alignvlm_jax.benchmarks.predictions import Predictions
from alignvlm_jax.benchmarks.questions import Question, choose_questions
from alignvlm_jax.benchmarks.runner import Runner, Trial
from alignvlm_jax.data import images, shards, tiling
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.loading import Loaded


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A perturbation of one size; with size 0, every kind leaves the input as it is.

    Attributes:
      size: its size, in the unit of its kind.
      seed: seed of its direction, which is the same at every size.
    """

    size: float
    seed: int

    @property
    def file(self) -> str:
        """The description of the perturbation in the name of a file of predictions."""
        raise NotImplementedError

    def header(self) -> dict[str, Any]:
        """Returns the description of the perturbation in the header of a file of predictions."""
        raise NotImplementedError

    def page(self, record: Record) -> Record:
        """Returns the record with perturbed images; by default the record itself."""
        return record

    def inputs(self, name: str) -> PackedSequence:
        """Returns the model inputs that perturb the prompt of this name within the model."""
        return {}

    def _seed(self, name: str) -> int:
        # Not hash(), whose value for a string differs from process to process.
        return zlib.crc32(f"{self.seed}/{name}".encode())


class FeatureNoise(Perturbation):
    """Gaussian noise on the vision features, just before the connector.

    `size` is its standard deviation.
    """

    @property
    def file(self) -> str:
        return f"sigma_{self.size:.6g}"

    def header(self) -> dict[str, Any]:
        return {"sigma": self.size, "seed": self.seed}

    def inputs(self, name: str) -> PackedSequence:
        # Without the fields, not with a sigma of 0: adding 0 would be another program, which may
        # round differently.
        if not self.size:
            return {}
        return {
            "noise_sigma": np.array(self.size, np.float32),
            "noise_seed": np.array(self._seed(name), np.uint32),
        }


class PixelNoise(Perturbation):
    """Gaussian noise on the page's pixels, independent in each channel and clipped.

    `size` is its standard deviation, where black is 0 and white is 1. The noise is added before the
    page is cut into tiles, so that downscaling a large page also averages over the noise.
    """

    @property
    def file(self) -> str:
        return f"pixels_sigma_{self.size:.6g}"

    def header(self) -> dict[str, Any]:
        return {"kind": "pixels", "sigma": self.size, "seed": self.seed}

    def page(self, record: Record) -> Record:
        return _changed(record, self._noisy) if self.size else record

    def _noisy(self, image: Image.Image, name: str) -> Image.Image:
        pixels = np.asarray(image)  # uint8 [height, width, 3]
        noise = np.random.default_rng(self._seed(name)).standard_normal(pixels.shape, np.float32)
        # Clipped as floats: a conversion to uint8 would wrap around, black to white.
        noisy = np.rint(pixels + 255 * self.size * noise).clip(0, 255)
        return Image.fromarray(noisy.astype(np.uint8))


class Shift(Perturbation):
    """A shift of the page's content by whole pixels, uniform in -size..size in both x and y.

    Uncovered pixels are white, and content that crosses the edge is lost.
    """

    @property
    def file(self) -> str:
        return f"layout_shift_{self.size}"

    def header(self) -> dict[str, Any]:
        return {"kind": "layout", "shift": self.size, "seed": self.seed}

    def page(self, record: Record) -> Record:
        # Without lines: the boxes of words are those of the original page.
        return dataclasses.replace(_changed(record, self._moved), lines=()) if self.size else record

    def offset(self, name: str) -> tuple[int, int]:
        """Returns how many pixels an image of this name moves to the right and down."""
        where = np.random.default_rng(self._seed(name)).random(2)
        # [0, 1) in 2 size + 1 intervals of equal length: all of -size..size are equally likely, and
        # the direction is the same at every size (`integers` would not keep it).
        x, y = (np.floor((2 * self.size + 1) * where) - self.size).astype(int).tolist()
        return x, y

    def _moved(self, image: Image.Image, name: str) -> Image.Image:
        moved = Image.new("RGB", image.size, "white")
        moved.paste(image, self.offset(name))
        return moved


def none(seed: int) -> Perturbation:
    """Returns the perturbation that changes nothing; all kinds have one file for its answers."""
    return FeatureNoise(0.0, seed)


def _changed(record: Record, change: Callable[[Image.Image, str], Image.Image]) -> Record:
    """Returns the record with `change(image, name)` of every image, each with its own name."""
    names = [f"{record.id}/{i}" for i in range(len(record.images))]
    decoded = [images.decode_image(image, record.id) for image in record.images]
    # PNG: a lossy format would add noise of its own.
    changed = (images.encode_png(change(*pair)) for pair in zip(decoded, names, strict=True))
    return dataclasses.replace(record, images=tuple(changed))


def pages_with_questions(loaded: Loaded, split: str) -> list[Record]:
    """Returns the records of a split that the chosen questions are about, in the split's order.

    Raises:
      UserError: the split is missing or has no questions.
    """
    records = shards.RecordSource(loaded.config.data.dir, split)
    questions = choose_questions(records, loaded.config.eval.num_questions)
    if not questions:
        raise UserError(f"split {split!r} in {loaded.config.data.dir} has no questions")
    return [records[index] for index in sorted({question.record for question in questions})]


def patch_side(loaded: Loaded, pages: Sequence[Record]) -> float:
    """Returns the shorter side of a patch in pixels of the page, as the median over pages.

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
            scales = tiling.tile_page(page, vision, data, most, f"an image of {record.id}").scales
            # The last scale is that of the detailed tiles: an overview comes first. Lines have each
            # their own.
            detailed = scales if data.tiling == "lines" else scales[-1:]
            sides.append(np.median((patch / detailed).min(1)))
    if not sides:
        raise UserError("the chosen records have no images")
    return float(np.median(sides))


def predict(
    evaluator: Runner, loaded: Loaded, split: str, perturbation: Perturbation
) -> Predictions:
    """Returns the predictions on a split under a perturbation.

    They are kept in analysis/noise/ of the workdir.
    """

    def inputs(question: Question) -> PackedSequence:
        return perturbation.inputs(question.id)

    path = base.folder(loaded) / "noise" / f"{split}_{perturbation.file}.jsonl"
    trial = Trial(path, {"noise": perturbation.header()}, page=perturbation.page, inputs=inputs)
    return evaluator.evaluate_trial(split, trial, f"{split}, {perturbation.file.replace('_', ' ')}")


def scores(
    loaded: Loaded, split: str, perturbations: Sequence[Perturbation]
) -> list[dict[str, Any]]:
    """Returns the scores on a split under each perturbation."""
    # One runner for all: what it has compiled for one size serves the others.
    evaluator = Runner(loaded)
    return [base.scores(predict(evaluator, loaded, split, one)) for one in perturbations]
