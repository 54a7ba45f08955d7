"""What can be done to what a model sees: noise on its vision features, noise on the page's pixels,
a page that moved.

A disturbance follows from its seed and from the id of the question or the page alone. It has the
same direction at every size, so that a curve over sizes is smooth.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from alignvlm_jax.data import images
from alignvlm_jax.data.examples import PackedSequence
from alignvlm_jax.data.record import Record
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """A disturbance of one size. Of size 0, where every kind is the same, it is none.

    Attributes:
      size: in the unit of its kind.
      seed: the same one gives the same disturbance at every size, but for its size.
    """

    size: float
    seed: int

    @property
    def file(self) -> str:
        """What the name of a file of answers says of it."""
        raise NotImplementedError

    def header(self) -> dict[str, Any]:
        """Returns what the header of that file says of it."""
        raise NotImplementedError

    def page(self, record: Record) -> Record:
        """Returns the record as it is shown."""
        return record

    def inputs(self, name: str) -> PackedSequence:
        """Returns the arrays that disturb the prompt of this name within the model."""
        return {}

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.seed}/{name}".encode())


class FeatureNoise(Disturbance):
    """Gaussian noise on the vision features, just before the connector.

    `size` is its standard deviation.
    """

    @property
    def file(self) -> str:
        return f"sigma_{self.size:.6g}"

    def header(self) -> dict[str, Any]:
        return {"sigma": self.size, "seed": self.seed}

    def inputs(self, name: str) -> PackedSequence:
        if not self.size:  # Adding 0 would be another program, which rounds otherwise.
            return {}
        return {"noise_sigma": np.float32(self.size), "noise_seed": np.uint32(self._seed(name))}


class PixelNoise(Disturbance):
    """Gaussian noise on the page's pixels, on each channel for itself, clipped. `size` is its
    standard deviation, where white is 1 and black is 0. It is there before the page is cut into
    tiles: what makes a large page smaller also averages over the noise."""

    @property
    def file(self) -> str:
        return f"pixels_sigma_{self.size:.6g}"

    def header(self) -> dict[str, Any]:
        return {"kind": "pixels", "sigma": self.size, "seed": self.seed}

    def page(self, record: Record) -> Record:
        return _changed(record, self._noisy) if self.size else record

    def _noisy(self, image: Image.Image, name: str) -> Image.Image:
        pixels = np.asarray(image)
        noise = np.random.default_rng(self._seed(name)).standard_normal(pixels.shape, np.float32)
        return Image.fromarray(
            np.rint(pixels + 255 * self.size * noise).clip(0, 255).astype(np.uint8)
        )


class Shift(Disturbance):
    """The page's content moved by whole pixels in x and in y, each at most `size` and uniform;
    white where nothing was. What crosses the edge is lost."""

    @property
    def file(self) -> str:
        return f"layout_shift_{self.size}"

    def header(self) -> dict[str, Any]:
        return {"kind": "layout", "shift": self.size, "seed": self.seed}

    def page(self, record: Record) -> Record:
        # The words are no longer where the record says.
        return dataclasses.replace(_changed(record, self._moved), lines=()) if self.size else record

    def offset(self, name: str) -> tuple[int, int]:
        """Returns how far an image of this name moves right and down."""
        where = np.random.default_rng(self._seed(name)).random(2)
        x, y = (np.floor((2 * self.size + 1) * where) - self.size).astype(int).tolist()
        return x, y

    def _moved(self, image: Image.Image, name: str) -> Image.Image:
        moved = Image.new("RGB", image.size, "white")
        moved.paste(image, self.offset(name))
        return moved


def _changed(record: Record, change: Callable[[Image.Image, str], Image.Image]) -> Record:
    """The record with every image changed, by a name of its own."""
    names = [f"{record.id}/{i}" for i in range(len(record.images))]
    decoded = [images.decode_image(image, record.id) for image in record.images]
    changed = (images.encode_png(change(*pair)) for pair in zip(decoded, names, strict=True))
    return dataclasses.replace(record, images=tuple(changed))


def measure(
    loaded: Loaded, pages: Sequence[Record], trials: Sequence[Disturbance]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Returns the mean distance of different visual tokens, undisturbed, and for each trial that of
    a token from itself undisturbed; `centred` ones with the mean undisturbed token taken off
    both."""
    clean = visual_tokens(loaded, pages, Disturbance(0, seed=0))
    mean = clean.mean(0)
    between = {
        "between_distance": between_distance(clean),
        "centred_between_distance": between_distance(clean - mean),
    }
    moved = []
    for trial in trials:
        noisy = visual_tokens(loaded, pages, trial) if trial.size else clean
        moved.append(
            {
                "distance": float(cosine_distances(clean, noisy).mean()),
                "centred_distance": float(cosine_distances(clean - mean, noisy - mean).mean()),
            }
        )
    return between, moved


def visual_tokens(loaded: Loaded, pages: Sequence[Record], disturbance: Disturbance) -> np.ndarray:
    """Returns what the connector makes of pages, disturbed, float32 [tokens, D]."""
    tiles = tiles_lib.tiles_of(loaded, [disturbance.page(page) for page in pages])
    rows = [disturbance.inputs(f"tile {index}") for index in range(len(tiles))]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return _flat(tiles_lib.map_tiles(loaded, _visual_tokens, {"tiles": tiles, **fields}))


def feature_std(loaded: Loaded, pages: Sequence[Record]) -> float:
    """Returns `signal_std` of the vision features of pages."""
    tiles = tiles_lib.tiles_of(loaded, pages)
    return signal_std(_flat(tiles_lib.map_tiles(loaded, _features, {"tiles": tiles})))


def signal_std(features: np.ndarray) -> float:
    """Returns the standard deviation of features [n, E] over patches, the root of its mean square
    over channels: what is the same in all patches is no signal."""
    return float(np.sqrt(np.float64(features).var(0).mean()))


def cosine_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns 1 - cos of each row of a [n, D] and the same row of b, float64 [n]; 1 where a row is
    zero."""
    # Rounding leaves equal rows a little below 0.
    return np.maximum(1 - (_unit(a) * _unit(b)).sum(-1), 0)


def between_distance(tokens: np.ndarray) -> float:
    """Returns the mean cosine distance of two different rows of tokens [n, D], over all pairs; 0 of
    a single row.

    All pairs need no matrix of pairs: their cosines sum to the squared length of the sum of unit
    vectors, less the rows with themselves.
    """
    unit = _unit(tokens)
    pairs = len(unit) * (len(unit) - 1)
    if not pairs:
        return 0.0
    return float(1 - ((unit.sum(0) ** 2).sum() - (unit**2).sum()) / pairs)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.float64(rows)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def _flat(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Vectors of all parts, float32 [n, width]."""
    return np.concatenate([np.float32(part).reshape(-1, part.shape[-1]) for part in parts])


def _features(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> Float[Array, "B I P E"]:
    return model.apply(variables, batch, method="features")


def _visual_tokens(
    model: VLM, variables: Mapping, batch: Mapping[str, Array]
) -> Float[Array, "B N D"]:
    return model.apply(variables, batch, method="visual_tokens")
