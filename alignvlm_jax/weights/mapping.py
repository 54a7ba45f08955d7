"""Which of our parameters is which published tensor: an entry of a table of names, read in
both directions. The tables stand with their families and formats.

An equation such as "DHh -> (Hh)D" says how the axes of our array (letters: `shapes.py`) lie in the
published one; brackets merge axes, 1 is an axis of size one. A name with {} stands for one tensor a
layer, where ours are stacked.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """One parameter of ours and its published tensor, or tensors."""

    path: str
    name: str
    equation: str

    @property
    def is_stacked(self) -> bool:
        """Whether our array has a leading axis of layers, each of them a tensor of its own
        there."""
        return "{}" in self.name

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the published names, one a layer where stacked, of our array of `shape`."""
        return (
            [self.name.format(layer) for layer in range(shape[0])]
            if self.is_stacked
            else [self.name]
        )

    def published_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of each published tensor of our array of `shape`."""
        permutation, groups = _parse(self.equation)
        sizes = shape[1:] if self.is_stacked else shape
        return tuple(math.prod(sizes[permutation[i]] for i in group) for group in groups)

    def views(self, array: np.ndarray) -> list[np.ndarray]:
        """Returns our array as the published tensors, one a layer where stacked, in the order of
        `names`.

        They are views of its memory: reading them exports, writing to them imports.
        """
        permutation, _ = _parse(self.equation)
        # For "DHh -> (Hh)D": [L, D, H, h] -> L views [H h, D].
        layers = list(array) if self.is_stacked else [array]
        shape = self.published_shape(array.shape)
        # Trap: where a reshape cannot be a view numpy would copy, and what is written to it would
        # be lost. With copy=False it raises.
        return [layer.transpose(permutation).reshape(shape, copy=False) for layer in layers]


@functools.cache
def _parse(equation: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The permutation of our axes, and the groups of permuted axes that make an axis there."""
    ours, theirs = equation.split(" -> ")
    # "(Hh)D" gives "Hh" and "D". "1" is no axis of ours: its group is empty, and the product of no
    # sizes is 1.
    terms = re.findall(r"\((\w+)\)|(\w)", theirs)
    letters = [merged or single for merged, single in terms]
    permutation = []
    groups = []
    for term in letters:
        start = len(permutation)
        permutation += [ours.index(letter) for letter in term if letter != "1"]
        groups.append(tuple(range(start, len(permutation))))
    if sorted(permutation) != list(range(len(ours))):
        raise ValueError(f"{equation!r} does not name every axis once")
    return tuple(permutation), tuple(groups)
