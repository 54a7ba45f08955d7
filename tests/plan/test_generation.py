"""Planned generation: its prompts, and how many of them are read at once."""

import dataclasses

import pytest

from alignvlm_jax.inference import batching, sampler
from alignvlm_jax.inference.buckets import Bucket
from alignvlm_jax.plan import generation
from tests.conftest import tiny_config


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 32),  # One record a sequence: all of it.
        ({"max_tiles": 3, "record_tiles": 1}, 8 + 8),  # 32 - 3 x 8 of text
        ({"max_tiles": 3, "record_tiles": 3}, 32),
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


@pytest.mark.parametrize("length", [64, 200, 512, 1024, 7558])
@pytest.mark.parametrize("per_device", [1, 7, 8, 16, 100])
def test_as_many_are_read_at_once_as_in_an_evaluation(per_device, length):
    num_devices = 4
    rows = object.__new__(batching._Rows)
    rows._per_device = per_device
    rows._num_devices = num_devices
    expected = rows._prefill_size(Bucket(2, length))
    assert num_devices * generation._prompts_at_once(per_device, length) == expected
