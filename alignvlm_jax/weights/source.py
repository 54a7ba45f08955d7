"""Where tensors come from: a file or folder of named tensors, each read in blocks of rows and so never held twice."""

import dataclasses
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
        """Yields a tensor as consecutive blocks of rows (axis 0), each of at most BLOCK_BYTES or one row; one of no or
        one dimension comes whole.

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
    """A source in which some tensors are replaced by others computed from them; what is used is no longer listed."""

    def __init__(self, base: Source, made: Mapping[str, Made]):
        self.name = base.name
        used = {name for one in made.values() for name in one.uses}
        kept = {name: tensor for name, tensor in base.tensors.items() if name not in used}
        self.tensors = kept | {name: one.tensor for name, one in made.items()}
        self._base, self._made = base, made

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
    """

    source: Source
    config: LLMConfig | VisionConfig
    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()


def rows_per_block(tensor: Tensor) -> int:
    """Returns how many rows of a tensor make a block; at least one."""
    row_bytes = int(np.prod(tensor.shape[1:])) * tensor.dtype.itemsize
    return max(1, BLOCK_BYTES // max(row_bytes, 1))


def split_rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array that is in memory already as `Source.blocks` would."""
    if array.ndim < 2:
        yield array
        return
    step = rows_per_block(Tensor(array.shape, array.dtype))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def read(source: Source, name: str) -> np.ndarray:
    """Returns a whole tensor; for small ones."""
    blocks = list(source.blocks(name))
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
