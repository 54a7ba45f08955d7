"""Padding of a stage's sequences, against the sequences that training builds of the same records."""

import dataclasses

import pytest

from alignvlm_jax.data import loader
from alignvlm_jax.plan import padding
from alignvlm_jax.plan.padding import Used


def built(config) -> Used:
    """The fractions of an epoch's sequences, built."""
    batches = loader.TrainBatches(config, start_sequence=0, local_rows=[0, 1, 2, 3])
    found = [loader.used(next(batches), config.model, config.data.max_tiles) for _ in range(12)]
    tokens, tiles = zip(*found, strict=True)
    return Used(sum(tokens) / len(tokens), sum(tiles) / len(tiles))


@pytest.mark.parametrize("packing", ["none", "offline"])
def test_it_is_that_of_the_sequences_that_are_built(demo_config, packing):
    """48 records: without packing 12 batches of 4 are an epoch; each takes one of two tasks."""
    data = dataclasses.replace(demo_config.data, packing=packing, seq_len=288, max_tiles=4)
    train = dataclasses.replace(demo_config.train, batch_size=4, num_steps=12)
    config = dataclasses.replace(demo_config, data=data, train=train)
    found = padding.used(config.data, config.model)
    real = built(config)
    assert found.tokens == pytest.approx(real.tokens, abs=0.08)
    assert found.tiles == pytest.approx(real.tiles, abs=0.08)


def test_packing_leaves_less_padding(demo_config):
    data = dataclasses.replace(demo_config.data, seq_len=576, max_tiles=8)
    loose, packed = (
        padding.used(dataclasses.replace(data, packing=packing), demo_config.model)
        for packing in ("none", "offline")
    )
    assert packed.tokens > 1.5 * loose.tokens and packed.tiles > 1.5 * loose.tiles


def test_without_the_data_nobody_knows(demo_config, tmp_path):
    for folder in (str(tmp_path / "absent"), str(tmp_path), "gs://bucket/data"):
        data = dataclasses.replace(demo_config.data, dir=folder)
        assert padding.used(data, demo_config.model) is None


def test_fraction_of_flops():
    """Tiles cost three quarters of these, tokens a quarter."""
    used = Used(tokens=0.5, tiles=1.0)
    flops = {"vision": 2.0, "connector": 1.0, "llm": 0.5, "loss": 0.5}
    assert used.of_flops(flops) == pytest.approx(0.75 + 0.25 * 0.5)
