"""Planned generation: its prompts."""

import dataclasses

import pytest

from alignvlm_jax.models.connectors import REGISTRY
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
    config = tiny_config()
    assert config.tokens_per_tile == config.model.tokens_per_tile == 8
    data = dataclasses.replace(config.data, **changes)
    assert dataclasses.replace(config, data=data).longest_prompt == tokens


def test_oracle_visual_tokens_are_of_training_alone():
    """There a tile has 8 image tokens, in a prompt 2."""
    config = tiny_config()
    model = dataclasses.replace(
        config.model, connector=REGISTRY["perceiver"].Options(name="perceiver", num_latents=2)
    )
    config = dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(config.data, max_tiles=2),
        train=dataclasses.replace(config.train, visual_source="oracle"),
    )
    assert (config.tokens_per_tile, model.tokens_per_tile) == (8, 2)
    assert config.longest_prompt == (32 - 2 * 8) + 2 * 2
