"""What can be done to what a model sees: noise on its vision features, noise on the page's pixels, a page that moved.

A disturbance follows from its seed and from the id of the question or the page alone. It has the same direction at
every size, so that a curve over sizes is smooth.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from alignvlm_jax.data import images, pages
from alignvlm_jax.data.rows import Row
from alignvlm_jax.data.schema import Record


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

    def inputs(self, name: str) -> Row:
        """Returns the arrays that disturb the prompt of this name within the model."""
        return {}

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.seed}/{name}".encode())


class FeatureNoise(Disturbance):
    """Gaussian noise on the vision features, just before the connector. `size` is its standard deviation."""

    @property
    def file(self) -> str:
        return f"sigma_{self.size:.6g}"

    def header(self) -> dict[str, Any]:
        return {"sigma": self.size, "seed": self.seed}

    def inputs(self, name: str) -> Row:
        if not self.size:  # Adding 0 would be another program, which rounds otherwise.
            return {}
        return {"noise_sigma": np.float32(self.size), "noise_seed": np.uint32(self._seed(name))}


class PixelNoise(Disturbance):
    """Gaussian noise on the page's pixels, on each channel for itself, clipped. `size` is its standard deviation, where
    white is 1 and black is 0. It is there before the page is cut into tiles: what makes a large page smaller also
    averages over the noise."""

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
        return Image.fromarray(np.rint(pixels + 255 * self.size * noise).clip(0, 255).astype(np.uint8))


class Shift(Disturbance):
    """The page's content moved by whole pixels in x and in y, each at most `size` and uniform; white where nothing was.
    What crosses the edge is lost."""

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
    changed = (pages.encode_png(change(*pair)) for pair in zip(decoded, names, strict=True))
    return dataclasses.replace(record, images=tuple(changed))
