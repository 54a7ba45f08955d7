"""A published tower onto the devices, one parameter at a time; every complaint comes before the
first is read."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax.errors import UserError, listed
from alignvlm_jax.shapes import Array
from alignvlm_jax.weights.mapping import Entry
from alignvlm_jax.weights.source import Source, Tower

MAX_NAMES = 8
"""Named in a message; the rest is counted."""


def check_tower(tower: Tower, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Checks that the tower's tensors are those of our parameters `wanted`, by path, without
    reading them.

    Returns:
      The names of the tensors that are known and not needed.

    Raises:
      UserError: tensors that are missing, of other shapes, or that nothing explains.
    """
    tensors = tower.source.tensors
    explained = set()
    missing = []
    for entry in tower.entries:
        shape = wanted[entry.path].shape
        for name in entry.names(shape):
            explained.add(name)
            if name not in tensors:
                missing.append(name)
            elif tensors[name].shape != entry.published_shape(shape):
                raise UserError(
                    f"{tower.source.name}: tensor {name} is {tensors[name].shape}; by the sizes "
                    f"that the file gives ({entry.path} {shape}) it must be "
                    f"{entry.published_shape(shape)}"
                )
            # A dtype that a source does not read is void there, and matters only where it is
            # needed.
            elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
                raise UserError(
                    f"{tower.source.name}: tensor {name} is of a type that is not read; save it "
                    "as bfloat16"
                )
    others = sorted(tensors.keys() - explained)
    unexplained = [
        name for name in others if not any(re.fullmatch(pattern, name) for pattern in tower.ignored)
    ]
    found = f" ({tower.found})" if tower.found else ""
    if missing:
        hint = _prefix_hint(missing, unexplained)
        raise UserError(f"{tower.source.name} lacks {_listed(missing)}{hint}{found}")
    if unexplained:
        raise UserError(
            f"{tower.source.name} holds what no parameter of ours is: {_listed(unexplained)}{found}"
        )
    return others


def load_tower(tower: Tower, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Returns the tower's parameters by path, on the shardings of `wanted` and in the dtypes of the
    file.

    A parameter is put together in host memory, a block of rows at a time, and leaves it before the
    next is begun: the host holds what is on the devices, one parameter and one block.

    Raises:
      UserError: a tensor cannot be read or holds a number that is not finite.
    """
    return {
        entry.path: _place(
            _assemble(tower.source, entry, wanted[entry.path].shape), wanted[entry.path]
        )
        for entry in tower.entries
    }


def dtype_of(source: Source, entry: Entry, shape: tuple[int, ...]) -> np.dtype:
    """Returns the dtype in which a parameter of `shape` is held."""
    # Layers may be stored in different dtypes: stacked, they have one that holds all of them.
    return np.result_type(*(source.tensors[name].dtype for name in entry.names(shape)))


def _assemble(source: Source, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    names = entry.names(shape)
    array = np.empty(shape, dtype_of(source, entry, shape))
    for name, view in zip(names, entry.views(array), strict=True):
        row = 0
        for block in source.blocks(name):
            if not np.isfinite(block).all():
                raise UserError(
                    f"{source.name}: tensor {name} holds numbers that are not finite (NaN or "
                    "infinity)"
                )
            # The view is in the file's order of axes, and its memory is that of `array`, in ours.
            view[row : row + len(block)] = block
            row += len(block)
        if row != len(view):
            raise UserError(f"{source.name}: tensor {name} ends after {row} of {len(view)} rows")
    return array


def _place(array: np.ndarray, wanted: jax.ShapeDtypeStruct) -> Array:
    # Waited for, or transfers would hold on to several arrays of the host at once.
    return jax.block_until_ready(jax.device_put(array, wanted.sharding))


def _prefix_hint(missing: list[str], unexplained: list[str]) -> str:
    """Says where the tensors that are missing stand under another prefix."""
    for name in missing:
        parts = name.split(".")
        # Two parts at least: every second tensor ends in "weight".
        for start in range(len(parts) - 1):
            tail = ".".join(parts[start:])
            for other in unexplained:
                if other == tail or other.endswith(f".{tail}"):
                    return f"; it holds {other} in the place of {name}: rename its tensors"
    return ""


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {listed(names, MAX_NAMES)}"
