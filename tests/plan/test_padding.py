"""Padding of a stage's sequences, against the sequences that training builds of the same records."""

import dataclasses

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.data import loader, shards
from alignvlm_jax.data.lengths import Limits
from alignvlm_jax.data.record import Record, Turn
from alignvlm_jax.errors import UserError
from alignvlm_jax.plan import padding
from alignvlm_jax.plan.padding import Used
from tests.prepared import write_shard


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
    found = padding.used(config.data, config.model, config.tokens_per_tile)
    real = built(config)
    assert found.tokens == pytest.approx(real.tokens, abs=0.08)
    assert found.tiles == pytest.approx(real.tiles, abs=0.08)


@pytest.mark.parametrize("changes", [{"blank_contrast": 24}, {"text_unit": "letter"}])
def test_patches_that_are_left_out_and_letters_are_in_no_index(demo_config, changes):
    data = dataclasses.replace(demo_config.data, **changes)
    assert padding.used(demo_config.data, demo_config.model, demo_config.tokens_per_tile)
    assert padding.used(data, demo_config.model, demo_config.tokens_per_tile) is None


@pytest.mark.parametrize("step", [1, 2], ids=["all", "every_second"])
@pytest.mark.parametrize(
    ("weight", "cap"), [(0.0, 0), (1.0, 4)], ids=["source_left_out", "source_capped"]
)
def test_sources_count_as_in_training(
    demo_config, data_dir, tokenizer, tmp_path, monkeypatch, weight, cap, step
):
    """Beside the documents as many records without a page, of which an epoch takes none or few."""
    turns = (Turn("What?", ("a",)),)
    words = [Record(f"word-{i}", "words", (), turns) for i in range(48)]
    write_shard(tmp_path / shards.shard_name("train", 0, 1), words, tokenizer)
    sources = {
        "documents": config_lib.SourceConfig(dir=str(data_dir)),
        "words": config_lib.SourceConfig(dir=str(tmp_path), weight=weight, cap=cap),
    }
    data = dataclasses.replace(demo_config.data, sources=sources, tasks={"answer": 1.0})
    alone = dataclasses.replace(data, sources={})
    monkeypatch.setattr(padding, "MAX_PLANNED", 96 // step)
    found = padding.used(data, demo_config.model, demo_config.tokens_per_tile)
    documents = padding.used(alone, demo_config.model, demo_config.tokens_per_tile)
    count = sources["words"].cap
    assert found.tiles == pytest.approx(documents.tiles * 48 / (48 + count), rel=0.05)


def test_oracle_visual_tokens_are_counted(demo_config):
    """An image token of each patch, where the connector makes fewer."""
    data = dataclasses.replace(demo_config.data, seq_len=500)
    few, many = (padding.used(data, demo_config.model, number) for number in (8, 32))
    assert many.tokens > 1.5 * few.tokens and many.tiles == few.tiles


def test_packing_leaves_less_padding(demo_config):
    data = dataclasses.replace(demo_config.data, seq_len=576, max_tiles=8)
    loose, packed = (
        padding.used(
            dataclasses.replace(data, packing=packing),
            demo_config.model,
            demo_config.tokens_per_tile,
        )
        for packing in ("none", "offline")
    )
    assert packed.tokens > 1.5 * loose.tokens and packed.tiles > 1.5 * loose.tiles


def test_without_the_data_nobody_knows(demo_config, tmp_path):
    for folder in (str(tmp_path / "absent"), str(tmp_path), "gs://bucket/data"):
        data = dataclasses.replace(demo_config.data, dir=folder)
        assert padding.used(data, demo_config.model, demo_config.tokens_per_tile) is None


def test_of_tiles_by_text_lines_nobody_knows(demo_config):
    data = dataclasses.replace(demo_config.data, tiling="lines")
    assert padding.used(data, demo_config.model, demo_config.tokens_per_tile) is None
    # Nor are they counted as a grid's.
    with pytest.raises(UserError, match=r"config\.data\.tiling 'lines': .* no index of sizes"):
        Limits.of(data, demo_config.model.vision, 32)


def test_fraction_of_flops():
    """Tiles cost three quarters of these, tokens a quarter."""
    used = Used(tokens=0.5, tiles=1.0)
    flops = {"vision": 2.0, "connector": 1.0, "llm": 0.5, "loss": 0.5}
    assert used.of_flops(flops) == pytest.approx(0.75 + 0.25 * 0.5)
