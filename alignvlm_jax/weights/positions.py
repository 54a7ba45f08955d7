"""Position tables for another resolution than the one that they were learnt at."""

import numpy as np

Grid = tuple[int, int]


def resample(table: np.ndarray, old: Grid, new: Grid, method: str) -> np.ndarray:
    """Returns positions [P', E] of the grid `new` (rows, columns) from those [P, E] of the grid `old`, in float32.

    Args:
      method: "bicubic" is what Hugging Face's encoders do when they are given another resolution (PyTorch's bicubic,
        a = -0.75, corners not aligned, no antialiasing); "linear" what big_vision does when it loads a checkpoint
        (corners aligned).
    """
    if old == new:
        return table
    weights = {"bicubic": _bicubic, "linear": _linear}[method]
    rows, columns = (weights(before, after) for before, after in zip(old, new, strict=True))
    grid = table.astype(np.float64).reshape(*old, -1)
    return np.einsum("yr,xc,rcE->yxE", rows, columns, grid).reshape(new[0] * new[1], -1).astype(np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
    """[new, old] weights of the four neighbours; beyond the edge stands the edge."""
    a = -0.75
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        neighbours = np.floor(centres).astype(int) + offset
        x = np.abs(centres - neighbours)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(weights, (np.arange(new), neighbours.clip(0, old - 1)), np.where(x <= 1, near, far))
    return weights


def _linear(old: int, new: int) -> np.ndarray:
    """[new, old] weights of the two neighbours, the first and last position kept where they are."""
    centres = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old)))
