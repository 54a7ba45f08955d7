"""Annotations of arrays in the package, checked while tests run.

jaxtyping puts `check` around every function and dataclass of the rooms below as they are imported;
what is wrong is raised as TypeCheckError. A letter of a shape has one size within a call, over
arguments and result. Annotations without arrays are left alone: tests give stand-ins for a device,
a file or a data set.
"""

import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import beartype
from beartype.door import is_bearable
from beartype.vale import Is

ROOMS = ("analysis", "benchmarks", "inference", "models", "ops", "parallel", "train", "weights")
ARRAYS = (jax.Array, np.ndarray, jaxtyping.AbstractArray)

# Trees that hold shapes, shardings or whatever a tree_map made of the arrays that they declare.
TREES = ("TrainState",)


def install() -> None:
    """Must be called before the rooms are imported."""
    jaxtyping.install_import_hook([f"alignvlm_jax.{room}" for room in ROOMS], "tests.typed.check")


def check(function: Callable) -> Callable:
    """`function` with its annotations of arrays checked by beartype."""
    if function.__qualname__ in {f"{tree}.__init__" for tree in TREES}:
        return function
    function.__annotations__ = {
        name: with_fields(hint)
        for name, hint in function.__annotations__.items()
        if has_arrays(hint)
    }
    return beartype(function)


def has_arrays(hint: Any) -> bool:
    if is_named_tuple(hint):
        return any(map(has_arrays, fields(hint).values()))
    if isinstance(hint, type) and issubclass(hint, ARRAYS):
        return True
    inner = typing.get_args(hint) or getattr(hint, "__constraints__", ())
    return any(map(has_arrays, inner))


@functools.cache
def with_fields(hint: Any) -> Any:
    """The hint, in which named tuples stand with what their fields must be: beartype by itself asks
    only whether something is of the class."""
    if is_named_tuple(hint):
        hints = {
            name: with_fields(field) for name, field in fields(hint).items() if has_arrays(field)
        }

        def has_its_fields(value: tuple) -> bool:
            return all(is_bearable(getattr(value, name), field) for name, field in hints.items())

        return typing.Annotated[hint, Is[has_its_fields]]
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.Union[tuple(map(with_fields, inner))]  # noqa: UP007
    if type(hint) is types.GenericAlias:  # tuple[...], Mapping[...], but no Callable[...]
        return hint.__origin__[tuple(map(with_fields, inner))]
    return hint


def is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def fields(named_tuple: type) -> dict[str, Any]:
    return typing.get_type_hints(named_tuple, include_extras=True)
