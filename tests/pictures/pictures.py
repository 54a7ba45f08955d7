"""What a PNG shows."""

import io

import numpy as np
from PIL import Image, ImageColor


def decode(png: bytes) -> np.ndarray:
    """Returns its pixels, int [Y, X, 3]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


def has(image: np.ndarray, color: str) -> np.ndarray:
    """Returns where pixels are of this color, bool [Y, X]."""
    return np.abs(image - ImageColor.getrgb(color)).max(-1) < 8


def area(image: np.ndarray, color: str) -> int:
    """Returns how many pixels are of this color."""
    return int(has(image, color).sum())
