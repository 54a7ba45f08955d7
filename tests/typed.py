"""Annotations of arrays in the package, checked while tests run.

jaxtyping puts `check` around every function and dataclass of the rooms below as they are imported;
what is wrong is raised as TypeCheckError. A letter of a shape has one size within a call, over
arguments and result. Annotations without arrays are left alone: tests give stand-ins for a device,
a file or a data set.
"""

import functools
import types
import typing
from collections.abc import Callable, Mapping
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

# What users call, which refuses itself what is no page, in one line.
DOORS = ("Assistant.answer", "Assistant.embed", "Assistant.lens", "Assistant._open", "open_page")


def install() -> None:
    """Must be called before the rooms are imported."""
    jaxtyping.install_import_hook([f"alignvlm_jax.{room}" for room in ROOMS], "tests.typed.check")


def check(function: Callable) -> Callable:
    """`function` with its annotations of arrays checked by beartype."""
    if function.__qualname__ in {*DOORS, *(f"{tree}.__init__" for tree in TREES)}:
        return function
    function.__annotations__ = {
        name: with_parts(hint)
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
def with_parts(hint: Any) -> Any:
    """The hint, in which named tuples stand with what their fields must be, and mappings with what
    all their values must be: beartype by itself asks for the class, and for one value."""
    if is_named_tuple(hint):
        hints = {
            name: with_parts(field) for name, field in fields(hint).items() if has_arrays(field)
        }

        def has_fields(value: tuple) -> bool:
            return all(is_bearable(getattr(value, name), part) for name, part in hints.items())

        return typing.Annotated[hint, validator(has_fields, hint)]
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.Union[tuple(map(with_parts, inner))]  # noqa: UP007
    if typing.get_origin(hint) in (dict, Mapping) and not isinstance(inner[1], typing.TypeVar):
        part = with_parts(inner[1])

        def has_values(value: Mapping) -> bool:
            return all(is_bearable(one, part) for one in value.values())

        return typing.Annotated[hint.__origin__, validator(has_values, hint)]
    if type(hint) is types.GenericAlias:  # tuple[...], list[...], but no Callable[...]
        return hint.__origin__[tuple(map(with_parts, inner))]
    return hint


def validator(function: Callable, hint: Any) -> Any:
    """`function` as beartype's validator of a hint, under a name of its own: beartype takes two of
    one name for the same, whatever they close over."""
    function.__name__ = function.__qualname__ = f"{function.__name__}_{id(hint)}"
    _kept.append(hint)  # So that no other hint gets its id.
    return Is[function]


_kept: list[Any] = []


def is_named_tuple(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def fields(named_tuple: type) -> dict[str, Any]:
    return typing.get_type_hints(named_tuple, include_extras=True)
