"""Planned generation: its prompts."""

import dataclasses

import pytest

from alignvlm_jax.inference import sampler
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 32),  # One record a sequence: all of it.
        ({"max_tiles": 3, "record_tiles": 1}, 8 + 8),  # 32 - 3 x 8 of text
        ({"max_tiles": 3, "record_tiles": 3}, 32),
        # Full tiles would be more than a sequence, and text may be all but a few tokens of it.
        ({"max_tiles": 6, "record_tiles": 1, "blank_contrast": 9}, 32),
    ],
    ids=str,
)
def test_a_prompt_is_of_one_record(changes, tokens):
    data = dataclasses.replace(tiny_config().data, **changes)
    assert sampler.longest_prompt(data, 8, 8) == tokens


def test_oracle_visual_tokens_are_of_training_alone():
    """There a tile has 8 image tokens, in a prompt 2."""
    data = dataclasses.replace(tiny_config().data, max_tiles=2)
    assert sampler.longest_prompt(data, 8, 2) == (32 - 2 * 8) + 2 * 2
