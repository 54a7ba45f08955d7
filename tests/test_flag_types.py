"""Types of flags: the value of a text, or one line about what is wrong with it."""

import argparse

import pytest

from alignvlm_jax import flag_types


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("positive", "3", 3),
        ("positives", "3,1", [3, 1]),
        ("positives", "", []),
        ("sizes", "0.5,2", [0.5, 2.0]),
        ("sizes", "", []),
        ("probability", "0", 0.0),
        ("probability", "1e-6", 1e-6),
        ("names", "align,mlp", ["align", "mlp"]),
        ("names", "align, mlp", ["align", "mlp"]),
    ],
)
def test_values(kind, text, value):
    assert getattr(flag_types, kind)(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("positive", "0", "0 is not a positive number"),
        ("positives", "3,-1", "-1 is not a positive number"),
        ("sizes", "1,0", "1,0 has a size that is not above 0"),
        ("sizes", "inf", "inf has a size that is not above 0"),
        ("sizes", "nan", "nan has a size that is not above 0"),
        ("sizes", "1;2", "1;2 is not made of numbers with commas between them"),
        ("names", "", "'' has an empty name"),
        ("names", "align,,mlp", "'align,,mlp' has an empty name"),
        ("probability", "1", "1 is no probability"),
    ],
)
def test_what_is_wrong(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        getattr(flag_types, kind)(text)
