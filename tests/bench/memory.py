"""What the compiler says that a program needs on a chip."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

GIB = 2**30


class Memory(NamedTuple):
    """GiB of a chip."""

    temporaries: float
    outputs: float


def of(step: Callable, out_shardings: Any, *args: jax.ShapeDtypeStruct) -> Memory | None:
    """Returns what `step` needs for arrays of these shapes and shardings; None where it is more
    than there is."""
    try:
        compiled = jax.jit(step, out_shardings=out_shardings).lower(*args).compile()
    except jax.errors.JaxRuntimeError as err:
        if "RESOURCE_EXHAUSTED" in str(err):
            return None
        raise
    analysis = compiled.memory_analysis()
    return Memory(analysis.temp_size_in_bytes / GIB, analysis.output_size_in_bytes / GIB)


def shown(memory: Memory | None) -> str:
    """Returns the temporaries as a cell of a table."""
    return "does not fit" if memory is None else f"{memory.temporaries:.3f}"
