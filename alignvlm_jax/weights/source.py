"""Named tensors of a file or folder, read in blocks of rows and so never held twice; position
tables resampled."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from alignvlm_jax.config import LLMConfig, VisionConfig
from alignvlm_jax.weights.mapping import Entry

BLOCK_BYTES = 64 * 2**20


class Tensor(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Source(Protocol):
    """Named tensors of a file or folder.

    Attributes:
      name: of the file or folder, for messages.
      tensors: by the publisher's names.
    """

    name: str
    tensors: Mapping[str, Tensor]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yields a tensor as consecutive blocks of rows (axis 0), each of at most BLOCK_BYTES or
        one row; one of no or one dimension comes whole.

        Raises:
          UserError: it cannot be read.
        """
        ...


class Arrays:
    """Tensors in memory."""

    def __init__(self, name: str, arrays: dict[str, np.ndarray]):
        self.name = name
        self.tensors = {name: Tensor(array.shape, array.dtype) for name, array in arrays.items()}
        self._arrays = arrays

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """See Source."""
        return split_rows(self._arrays[name])


class Made(NamedTuple):
    """A tensor that is computed from others when it is read: make(*arrays of `uses`)."""

    tensor: Tensor
    uses: tuple[str, ...]
    make: Callable[..., np.ndarray]


class Derived:
    """A source in which some tensors are replaced by others computed from them; what is used is no
    longer listed."""

    def __init__(self, base: Source, made: Mapping[str, Made]):
        self.name = base.name
        used = {name for one in made.values() for name in one.uses}
        # What is used up is hidden, or `load.check_tower` would find tensors that nothing explains.
        kept = {name: tensor for name, tensor in base.tensors.items() if name not in used}
        self.tensors = kept | {name: one.tensor for name, one in made.items()}
        self._base = base
        self._made = made

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """See Source."""
        if name not in self._made:
            return self._base.blocks(name)
        made = self._made[name]
        return split_rows(made.make(*(read(self._base, used) for used in made.uses)))


@dataclasses.dataclass(frozen=True)
class Tower:
    """A published language model or vision encoder, ready to be read.

    Attributes:
      source: its tensors.
      config: its sizes, as we name them.
      entries: which of its tensors is which of our parameters.
      ignored: regular expressions (fullmatch) of tensors that are known and not needed.
      found: what its files call themselves, where that is another class; for complaints.
      note: what is to be told about how it was read; empty: nothing.
    """

    source: Source
    config: LLMConfig | VisionConfig
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()
    found: str = ""
    note: str = ""


def rows_per_chunk(tensor: Tensor) -> int:
    """Returns how many rows of a tensor make a block; at least one."""
    row_bytes = int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize
    # A tensor of which an axis is empty has rows of no bytes.
    return max(1, BLOCK_BYTES // max(row_bytes, 1))


def split_rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array that is in memory already as `Source.blocks` would."""
    if array.ndim < 2:
        yield array
        return
    step = rows_per_chunk(Tensor(array.shape, array.dtype))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def read(source: Source, name: str) -> np.ndarray:
    """Returns a whole tensor; for small ones."""
    blocks = list(source.blocks(name))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def largest_difference(source: Source, name: str, other: str) -> float:
    """Returns the largest difference between two tensors; infinity where their shapes differ."""
    if source.tensors[name].shape != source.tensors[other].shape:
        return math.inf
    # By blocks of rows, which are the same where the types are. In float32, as they are used.
    if source.tensors[name].dtype == source.tensors[other].dtype:
        pairs = zip(source.blocks(name), source.blocks(other), strict=True)
    else:
        pairs = iter([(read(source, name), read(source, other))])
    return max(float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max()) for a, b in pairs)


Grid = tuple[int, int]


def resample(table: np.ndarray, old: Grid, new: Grid, method: str) -> np.ndarray:
    """Returns positions [P', E] of the grid `new` (rows, columns) from those [P, E] of the grid
    `old`, in float32.

    Args:
      method: "bicubic" is what Hugging Face's encoders do when they are given another resolution
        (PyTorch's bicubic, a = -0.75, corners not aligned, no antialiasing); "bilinear" what NaFlex
        SigLIP 2 does (corners not aligned, antialiased); "linear" what big_vision does when it
        loads a checkpoint (corners aligned).
    """
    if old == new:
        return table
    weights = {"bicubic": _bicubic, "bilinear": _bilinear, "linear": _linear}[method]
    rows, columns = (weights(before, after) for before, after in zip(old, new, strict=True))
    grid = table.astype(np.float64).reshape(*old, -1)
    return (
        # Separable: [y, Y] and [x, X] weigh rows and columns of the old grid [Y, X, E].
        np.einsum("yY,xX,YXE->yxE", rows, columns, grid)
        .reshape(new[0] * new[1], -1)
        .astype(np.float32)
    )


def _bicubic(old: int, new: int) -> np.ndarray:
    """[new, old] weights of the four neighbours; beyond the edge stands the edge."""
    a = -0.75
    # Where the centre of each new position lies, in units of old ones; corners are not aligned.
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        neighbours = np.floor(centres).astype(int) + offset
        x = np.abs(centres - neighbours)
        # The kernel of cubic convolution, up to a distance of 1, and from there to 2.
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        # At an edge several neighbours are one position: `weights[...] += ` would count one of them
        # only.
        np.add.at(
            weights, (np.arange(new), neighbours.clip(0, old - 1)), np.where(x <= 1, near, far)
        )
    return weights


def _bilinear(old: int, new: int) -> np.ndarray:
    """[new, old] weights that fall off linearly, over as many old positions as a new one covers."""
    centres = (np.arange(new) + 0.5) * old / new
    distances = np.abs(np.arange(old) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - distances / max(old / new, 1))
    # At an edge some of the neighbours are missing.
    return weights / weights.sum(1, keepdims=True)


def _linear(old: int, new: int) -> np.ndarray:
    """[new, old] weights of the two neighbours, the first and last position kept where they are."""
    centres = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old)))
