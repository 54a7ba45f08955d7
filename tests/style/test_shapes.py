"""Annotations of shapes are checked while tests run, and their letters are those of the legend."""

import ast
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
from jaxtyping import TypeCheckError, jaxtyped

from alignvlm_jax import shapes
from alignvlm_jax.models.layers import RMSNorm, apply_rope
from alignvlm_jax.ops.attention import same_segment
from alignvlm_jax.ops.cross_entropy import TokenLosses
from alignvlm_jax.ops.layer_norm import layer_norm
from alignvlm_jax.ops.vocab_average import Norm, vocab_logits
from tests import typed

PACKAGE = pathlib.Path(shapes.__file__).parent
DTYPES = set(shapes.__all__) - {"Array"}
LETTERS = {
    letter
    for letters in re.findall(r"(?:^|  )((?:\w, )*\w)  (?=\w)", shapes.__doc__, re.M)
    for letter in letters.split(", ")
}


def zeros(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "call",
    [
        lambda: layer_norm(zeros(2, 3), zeros(3), zeros(4), 1e-6),
        lambda: layer_norm(zeros(2, 3, dtype=int), zeros(3), zeros(3), 1e-6),
        lambda: same_segment(zeros(2, 3), zeros(2, 3)),
        lambda: apply_rope(zeros(1, 2, 3, 8), zeros(1, 2, dtype=int), zeros(3)),
        # The fields of a named tuple, and a module of flax.
        lambda: vocab_logits(zeros(2, 3), zeros(3, 5), Norm(zeros(5), zeros(4), 1e-6)),
        lambda: RMSNorm(1e-6).init(np.zeros(2, np.uint32), zeros(2, 3, dtype=int)),
    ],
)
def test_a_wrong_shape_or_dtype_is_an_error(call):
    with pytest.raises(TypeCheckError):
        call()


def test_a_result_is_checked_against_the_arguments():
    def right(x: shapes.Float[shapes.Array, "B T"]) -> TokenLosses:
        return TokenLosses(x, x, x > 0)

    def wrong(x: shapes.Float[shapes.Array, "B T"]) -> TokenLosses:
        return TokenLosses(x, x[:, 1:], x > 0)

    right, wrong = (jaxtyped(typechecker=typed.check)(function) for function in (right, wrong))
    right(zeros(2, 3))
    with pytest.raises(TypeCheckError, match="return value"):
        wrong(zeros(2, 3))


def axes(source: str) -> Iterator[str]:
    """Yields the names of axes in annotations, suffixes of names and einsums of a module."""
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "id", getattr(node, "arg", None))
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) in DTYPES:
            shape = re.sub(r"\{.*?\}", "", node.slice.elts[1].value)
            yield from re.findall(r"[^\W\d]\w*", shape)
        elif isinstance(name, str) and (
            suffix := re.fullmatch(r"[a-z].*_([A-Za-z1]*[A-Z][A-Za-z1]*)", name)
        ):
            yield from suffix[1].replace("1", "")
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[A-Za-z,]+->[A-Za-z]*", node.value)
        ):
            yield from re.findall(r"\w", node.value)


def strangers(source: str) -> set[str]:
    """Axes that are neither a letter of the legend nor a name in lower case."""
    return {axis for axis in axes(source) if axis not in LETTERS and not re.match("[a-z]{3}", axis)}


def test_every_letter_is_in_the_legend():
    found = {
        path.relative_to(PACKAGE).as_posix(): strangers(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }
    assert {file: letters for file, letters in found.items() if letters} == {}


def test_every_room_with_shapes_is_checked():
    rooms = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if "alignvlm_jax.shapes import" in path.read_text()
    }
    assert rooms <= set(typed.ROOMS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('def f(x: Float[Array, "B Q"]) -> Int[np.ndarray, "BT {num}+1 ..."]: ...', {"Q", "BT"}),
        ("x_BQ = y_B1D = MAX_Q = num_q", {"Q"}),
        ('einsum("BTD,DZ->BTZ")', {"Z"}),
        ('def f(x: Float[Array, "*B T heads h//2"]): ...', set()),
    ],
)
def test_strangers_are_seen(source, expected):
    assert strangers(source) == expected
