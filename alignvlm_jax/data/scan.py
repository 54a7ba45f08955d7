"""Scan noise: what a cheap scanner does to a page, without moving its words.

No skew: boxes and character edges of the words stay exact.
"""

import io

import numpy as np
from PIL import Image, ImageFilter


def degrade(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Returns a degraded copy of a gray image. Strength 0 returns the image itself; 1 is a bad but legible scan."""
    if strength <= 0:
        return image
    width, height = image.size
    image = image.filter(ImageFilter.GaussianBlur(0.6 * strength * rng.random()))
    pixels = np.asarray(image, np.float32) / 255
    fade = 0.35 * strength * rng.random()
    pixels = pixels * (1 - fade) + fade
    pixels *= _smooth(rng.uniform(1 - 0.15 * strength, 1, (3, 3)), width, height)
    grain_size = (height // 2 + 1, width // 2 + 1)
    pixels += _smooth(rng.normal(0, 0.05 * strength, grain_size), width, height)
    pixels += rng.normal(0, 0.02 * strength, pixels.shape)
    pixels[rng.random(pixels.shape) < 0.0005 * strength] = rng.uniform(0, 0.5)
    noisy = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    buffer = io.BytesIO()
    noisy.save(buffer, "JPEG", quality=int(rng.integers(40, 95)))
    return Image.open(buffer).convert("L")


def _smooth(coarse: np.ndarray, width: int, height: int) -> np.ndarray:
    """Blows a coarse field up to the page's size."""
    field = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(field.resize((width, height), Image.Resampling.BICUBIC))
