"""The paper's stages against its table 6, for every LLM, by parameters and paths that are really
there."""

import dataclasses

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.commands import config_flag
from alignvlm_jax.configs import stage1, stage2, stage3
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.models.connectors import REGISTRY
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import state
from tests import paper_data

PATCHES = 729
LLMS = ("llama32_1b", "llama32_3b", "llama31_8b")
# Records in a batch, learning rate, text length, epochs x records of the data: of the paper; packed
# sequences in a batch, and steps, which are records / (sequences x records in one).
TABLE = {
    ("stage1", "llama32_1b"): (512, 1e-5, 1024, 8_100_000, 128, 17_628),
    ("stage1", "llama32_3b"): (512, 1e-5, 1024, 8_100_000, 128, 17_628),
    ("stage1", "llama31_8b"): (512, 1e-5, 1024, 8_100_000, 128, 17_628),
    ("stage2", "llama32_1b"): (512, 5e-5, 2048, 7_500_000, 256, 12_362),
    ("stage2", "llama32_3b"): (256, 5e-5, 2048, 7_500_000, 128, 24_724),
    ("stage2", "llama31_8b"): (256, 1e-5, 2048, 7_500_000, 128, 24_724),
    ("stage3", "llama32_1b"): (512, 5e-5, 2048, 2_850_000, 256, 4_139),
    ("stage3", "llama32_3b"): (256, 5e-5, 2048, 2_850_000, 128, 8_278),
    ("stage3", "llama31_8b"): (256, 1e-5, 2048, 2_850_000, 128, 8_278),
}
STAGES = {stage.STAGE.name: stage.STAGE for stage in (stage1, stage2, stage3)}
MOST_PADDING = 0.05
"""Fraction of a stage's tokens, and of its places for tiles, that nothing may stand in; of records
of other sizes than its own a little more."""


def load(name: str, *overrides: str) -> tuple[config_lib.Config, ...]:
    """As the command line does."""
    stages, rest = config_flag.parse([f"--config=configs/{name}", *overrides])
    assert not rest
    return stages


def unpacked(config: config_lib.Config) -> config_lib.Config:
    """The stage with a record a sequence, of the paper's text length beside all of its tiles."""
    text_length = STAGES[config.stage].text_length
    seq_len = -(-(10 * PATCHES + text_length) // 128) * 128
    data = dataclasses.replace(config.data, packing="none", seq_len=seq_len, max_tiles=10)
    return dataclasses.replace(config, data=data)


def paths(config: config_lib.Config) -> state.Params:
    return state.abstract_params(
        vlm.VLM(config.model), mesh_lib.abstract(config.mesh, config.model, config.train, 8)
    )


@pytest.mark.parametrize(("stage", "llm"), TABLE)
def test_table_6(stage, llm):
    (config,) = load(f"{stage}.py:{llm}")
    num_records, learning_rate, text_length, in_all, batch_size, num_steps = TABLE[stage, llm]
    assert config.stage == stage
    assert (config.train.batch_size, config.optim.learning_rate) == (batch_size, learning_rate)
    assert (config.train.num_steps, config.train.num_records) == (num_steps, in_all)
    # A power of two is at most a factor of the square root of 2 away.
    in_a_batch = batch_size * STAGES[stage].records_per_sequence
    assert 2**-0.5 <= in_a_batch / num_records <= 2**0.5
    assert 0 <= num_steps * in_a_batch - in_all < in_a_batch
    assert config.optim.warmup_steps == pytest.approx(0.03 * num_steps, abs=1)
    assert config.data.packing == "offline" and config.data.seq_len % 512 == 0
    assert config.data.tiles_of_a_record == 10 and config.data.use_overview
    # A text of the paper's length fits beside all tiles of its record.
    assert config.model.tokens_per_tile == PATCHES
    assert 10 * PATCHES + text_length <= config.data.seq_len
    assert config.model.connector.name == "align" and config.train.patch_token_weight == 0


@pytest.mark.parametrize("data", paper_data.DATA)
def test_records_of_the_sizes_published_fill_sequences(data):
    """The plan is the real one, of records that are drawn."""
    stage = data.partition(",")[0]
    (config,) = load(f"{stage}.py:llama32_1b")
    padding = paper_data.padding(config, paper_data.draw(data, 20_000))
    most = MOST_PADDING if data == stage else 1.1 * MOST_PADDING
    assert padding.tokens <= most and padding.tiles <= most
    if data == stage:
        expected = STAGES[stage].records_per_sequence
        assert padding.records_per_sequence == pytest.approx(expected, rel=0.01)
    alone = paper_data.padding(unpacked(config), paper_data.draw(data, 20_000))
    assert alone.records_per_sequence == 1 and alone.tokens > 0.25


def test_a_stage_takes_the_steps_that_its_data_ask_for():
    """In the flag that it prints where its records are packed otherwise."""
    (config,) = load("stage1.py:llama32_1b", "--config.stages.stage1.train.num_steps=5")
    assert config.train.num_steps == 5


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize(
    ("num_devices", "num_slices", "of_256", "of_128"),
    [
        (16, 1, (1, 16, 1), (1, 16, 1)),
        (256, 1, (2, 128, 1), (1, 128, 2)),
        (512, 1, (2, 128, 2), (1, 128, 4)),
        (512, 2, (2, 128, 2), (2, 64, 4)),
        (1024, 1, (2, 128, 4), (1, 128, 8)),
    ],
)
def test_every_stage_starts_on_any_number_of_chips(llm, num_devices, num_slices, of_256, of_128):
    """By the rows of its batch: where they are fewer than the chips, `tensor` takes part."""
    for stage in ("stage1", "stage2", "stage3"):
        (config,) = load(f"{stage}.py:{llm}")
        mesh = mesh_lib.abstract(config.mesh, config.model, config.train, num_devices, num_slices)
        assert mesh.axis_sizes == {256: of_256, 128: of_128}[config.train.batch_size]
    state.abstract_params(vlm.VLM(config.model), mesh)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_what_is_frozen(stage):
    (config,) = load(f"{stage}.py:llama31_8b")
    params = paths(config)
    frozen = set(state.flatten(params)) - state.trainable_paths(config.train, config.stage, params)
    expected = (
        {path for path in state.flatten(params) if path.startswith("vision/")}
        if stage == "stage3"
        else set()
    )
    assert frozen == expected


def test_another_llm_names_the_nearest():
    with pytest.raises(
        UserError, match=r"stage2 is known for .* not for 'llama31_7b'; did you mean 'llama31_8b'"
    ):
        load("stage2.py:llama31_7b")


@pytest.mark.parametrize("connector", REGISTRY)
def test_low_resource(connector):
    first, second = load(f"low_resource.py:{connector}")
    assert first.model.connector.name == connector
    assert (first.train.batch_size, first.optim.learning_rate, first.train.num_steps) == (
        32,
        1e-3,
        17_437,
    )
    assert (second.train.batch_size, second.optim.learning_rate, second.train.num_steps) == (
        8,
        1e-5,
        97_375,
    )
    assert first.optim.learning_rate_scale == {} and second.optim.learning_rate_scale == {
        "vision": pytest.approx(0.2)
    }
    params = paths(first)
    assert state.trainable_paths(first.train, first.stage, params) == {
        p for p in state.flatten(params) if p.startswith("connector/")
    }
    assert state.trainable_paths(second.train, second.stage, params) == set(state.flatten(params))
