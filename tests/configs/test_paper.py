"""The paper's stages against its table 6, for every LLM, by parameters and paths that are really
there."""

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.commands import config_flag
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.models.connectors import REGISTRY
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import state

PATCHES = 729
LLMS = ("llama32_1b", "llama32_3b", "llama31_8b")
# Batch size, learning rate, text length, steps; of the paper but the steps, which are records x
# epochs / batch.
TABLE = {
    ("stage1", "llama32_1b"): (512, 1e-5, 1024, 15_820),
    ("stage1", "llama32_3b"): (512, 1e-5, 1024, 15_820),
    ("stage1", "llama31_8b"): (512, 1e-5, 1024, 15_820),
    ("stage2", "llama32_1b"): (512, 5e-5, 2048, 14_648),
    ("stage2", "llama32_3b"): (256, 5e-5, 2048, 29_296),
    ("stage2", "llama31_8b"): (256, 1e-5, 2048, 29_296),
    ("stage3", "llama32_1b"): (512, 5e-5, 2048, 5_566),
    ("stage3", "llama32_3b"): (256, 5e-5, 2048, 11_132),
    ("stage3", "llama31_8b"): (256, 1e-5, 2048, 11_132),
}


def load(name: str, *overrides: str) -> tuple[config_lib.Config, ...]:
    """As the command line does."""
    stages, rest = config_flag.parse([f"--config=configs/{name}", *overrides])
    assert not rest
    return stages


def paths(config: config_lib.Config) -> state.Params:
    return state.abstract_params(
        vlm.VLM(config.model), mesh_lib.abstract(config.mesh, config.model, config.train, 8)
    )


@pytest.mark.parametrize(("stage", "llm"), TABLE)
def test_table_6(stage, llm):
    (config,) = load(f"{stage}.py:{llm}")
    batch_size, learning_rate, text_length, num_steps = TABLE[stage, llm]
    assert config.stage == stage
    assert (config.train.batch_size, config.optim.learning_rate) == (batch_size, learning_rate)
    assert config.train.num_steps == num_steps
    assert config.data.max_tiles == 10 and config.data.use_overview
    assert config.model.tokens_per_tile == PATCHES
    assert (
        0 <= config.data.seq_len - (10 * PATCHES + text_length) < 128
        and config.data.seq_len % 128 == 0
    )
    assert config.model.connector.name == "align" and config.train.patch_token_weight == 0


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize(
    ("num_devices", "num_slices", "of_512", "of_256"),
    [
        (16, 1, (1, 16, 1), (1, 16, 1)),
        (256, 1, (2, 128, 1), (2, 128, 1)),
        (512, 1, (4, 128, 1), (2, 128, 2)),
        (512, 2, (4, 128, 1), (2, 128, 2)),
        (1024, 1, (4, 128, 2), (2, 128, 4)),
    ],
)
def test_every_stage_starts_on_any_number_of_chips(llm, num_devices, num_slices, of_512, of_256):
    """By the rows of its batch: where they are fewer than the chips, `tensor` takes part."""
    for stage in ("stage1", "stage2", "stage3"):
        (config,) = load(f"{stage}.py:{llm}")
        mesh = mesh_lib.abstract(config.mesh, config.model, config.train, num_devices, num_slices)
        assert mesh.axis_sizes == {512: of_512, 256: of_256}[config.train.batch_size]
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
