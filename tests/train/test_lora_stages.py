"""LoRA from one checkpoint to the next: whole runs, and what a stage begins with."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import LoraConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, lora, restore, state, warm_start
from alignvlm_jax.train.checkpoint import Checkpoints
from tests.conftest import random_batch, tiny_config
from tests.train import fake_run
from tests.train.lora_states import LORA, Q, abstract_of, drawn, with_lora


def runs(rank: LoraConfig = LORA, second: LoraConfig | None = None, **changes):
    """The stages of `fake_run`, with LoRA."""
    text, pixels = fake_run.stages(**changes)
    text = dataclasses.replace(text, lora=rank, train=dataclasses.replace(text.train, trainable=()))
    trainable = ("connector/.*",)
    pixels = dataclasses.replace(
        pixels,
        lora=rank if second is None else second,
        train=dataclasses.replace(pixels.train, trainable=trainable),
    )
    return text, pixels


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(tmp_path):
    configs = runs(bfloat16_params=("vision/.*", "llm/mlp/.*|llm/blocks/mlp/.*"))
    fake_run.train(tmp_path / "whole", configs=configs)
    with pytest.raises(UserError):
        fake_run.train(
            tmp_path / "parts", fake_run.Batches(fake_run.send(2, at=6)), configs=configs
        )
    fake_run.train(tmp_path / "parts", configs=configs)
    whole, parts = (fake_run.stored(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    # The base is that of the start: both stages trained beside it, and the factors went on.
    first = fake_run.stored(tmp_path / "whole", fake_run.NUM_STEPS)
    base = "['params']['llm']['blocks']['attn']['q']['kernel']"
    np.testing.assert_array_equal(first[base], whole[base])
    b = "['params']['lora']['llm']['blocks']['attn']['q']['kernel']['b']"
    assert first[b].any() and not np.array_equal(first[b], whole[b])
    assert whole["['params']['vision']['blocks']['mlp']['up']['kernel']"].dtype == jnp.bfloat16

    # What is loaded for use is merged, on any mesh.
    mesh = mesh_lib.make_mesh(config_lib.MeshConfig(data=-1), configs[0].model, None)
    _, model, params, step = restore.load_model(tmp_path / "whole", mesh)
    assert step == fake_run.TOTAL and "lora" not in params
    a = whole[b.replace("['b']", "['a']")]
    delta = np.einsum("ldr,lrhk->ldhk", a, whole[b])
    loaded = np.asarray(params["llm"]["blocks"]["attn"]["q"]["kernel"])
    np.testing.assert_allclose(loaded, whole[base] + 2.0 * delta, atol=1e-6)
    assert params["vision"]["blocks"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    batch = random_batch(configs[1])
    unmerged = state.unflatten(
        {path[2:-2].replace("']['", "/"): x for path, x in whole.items() if "opt_state" not in path}
    )["params"]
    logits = (
        model.apply({"params": lora.merged(unmerged, LORA.alpha, model.config)}, batch).logits,
        model.apply({"params": params}, batch).logits,
    )
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    "second",
    [lora.OFF, LoraConfig(rank=2, alpha=6.0), LoraConfig(rank=3, alpha=9.0)],
    ids=["none", "another rank", "another alpha"],
)
def test_factors_that_the_next_stage_does_not_have_are_merged_and_not_lost(tmp_path, second):
    first, last = runs(second=second, num_steps=2)
    last = dataclasses.replace(last, train=dataclasses.replace(last.train, num_steps=1))
    fake_run.train(tmp_path / "run", configs=(first, last))
    before, after = (fake_run.stored(tmp_path / "run", step) for step in (2, 3))
    base = "['params']['llm']['blocks']['attn']['q']['kernel']"
    a, b = (before[f"['params']['lora']{base[10:]}['{name}']"] for name in "ab")
    assert b.any()
    expected = before[base] + 2.0 * np.einsum("ldr,lrhk->ldhk", a, b)
    np.testing.assert_allclose(after[base], expected, atol=1e-6)
    assert np.abs(2.0 * np.einsum("ldr,lrhk->ldhk", a, b)).max() > 1e-5
    lora_a = f"['params']['lora']{base[10:]}['a']"
    assert (lora_a in after) == bool(second.rank)
    # Another a, drawn anew: an update is of 2e-3 at most.
    if second.rank == 3:
        assert np.abs(after[lora_a] - a).max() > 0.01


@contextlib.contextmanager
def saved(workdir, config: config_lib.Config, params: state.Params):
    """Yields checkpoints whose step 1 holds the parameters."""
    with Checkpoints(workdir / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(
            1,
            state.TrainState(np.int32(1), params, ()),
            position={"next_sequence": 0},
            metadata={
                "layout_version": 1,
                "stage": "train",
                "config": config_lib.to_json((config,)),
            },
            metrics=None,
        )
        checkpoints.wait()
        yield checkpoints


HEAD = "llm/head/kernel"


@pytest.mark.parametrize("alpha", [6.0, 9.0], ids=["the factors go on", "the factors end"])
def test_a_connector_that_starts_from_the_head_starts_from_the_merged_one(mesh, tmp_path, alpha):
    config = with_lora(dataclasses.replace(LORA, targets=(HEAD,)), load=("llm/.*",))
    llm = dataclasses.replace(config.model.llm, tie_embeddings=False)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))
    abstract = abstract_of(config, mesh)
    params = drawn(abstract.params)
    a, b = (state.flatten(params)[path] for path in lora.factors(HEAD))
    expected = state.flatten(params)[HEAD] + 2.0 * a @ b
    now = dataclasses.replace(config.lora, alpha=alpha)
    with saved(tmp_path, config, params) as checkpoints:
        found = warm_start.read(config.train, abstract, checkpoints, 1, now)
    model = vlm.VLM(config.model)
    started, _ = warm_start.start_params(model, abstract, found, jax.random.key(0))
    w2 = started["connector"]["w2"]["kernel"]
    np.testing.assert_allclose(w2, expected, atol=1e-6)
    assert w2.sharding == abstract.params["connector"]["w2"]["kernel"].sharding


@pytest.mark.parametrize("half", [(), ("llm/.*",)], ids=["exact", "rounded"])
def test_what_is_merged_when_a_stage_begins_is_told(mesh, tmp_path, half):
    config = with_lora(bfloat16_params=half)
    next_lora = dataclasses.replace(LORA, rank=2)
    abstract = abstract_of(dataclasses.replace(config, lora=next_lora), mesh)
    with saved(tmp_path, config, drawn(abstract_of(config, mesh).params)) as checkpoints:
        found = warm_start.read(config.train, abstract, checkpoints, 1, next_lora)
    model = vlm.VLM(config.model)
    _, table = warm_start.start_params(model, abstract, found, jax.random.key(0))
    *_, title = (column.header for column in table.columns)
    *_, cells = (list(column.cells) for column in table.columns)
    assert title == "merged into their kernels" + (", rounded to bfloat16" if half else "")
    # Of rank 3, beside queries and values of two layers: [16, 3] each, [3, 4, 4] and [3, 2, 4].
    assert [cell for cell in cells if cell != "-"] == [f"4 / {2 * (48 + 48 + 48 + 24)}"]


def test_factors_go_with_their_kernels_whatever_the_patterns(mesh, tmp_path):
    """`load` of the LLM alone would else take the kernels and leave what was trained of them."""
    config = with_lora(load=("llm/.*",))
    abstract = abstract_of(config, mesh)
    params = drawn(abstract.params)
    with saved(tmp_path, config, params) as checkpoints:
        found = warm_start.read(config.train, abstract, checkpoints, 1, config.lora)
        leaves = state.flatten(found.params)
        assert set(lora.factors(Q)) < leaves.keys() and not found.factors
        others = dataclasses.replace(config.train, load=("vision/.*",))
        found = warm_start.read(others, abstract, checkpoints, 1, config.lora)
        assert not lora.kernels(state.flatten(found.params)) and not found.factors
        # Nothing at all would be loaded of it.
        alone = dataclasses.replace(config.train, load=("llm/.*", "lora/.*"))
        with pytest.raises(UserError, match=r"load 'lora/.\*' matches no parameter; did you mean"):
            warm_start.read(alone, abstract, checkpoints, 1, config.lora)


@pytest.mark.parametrize(
    ("half", "platform", "dtype"),
    [((), "gpu", "bfloat16"), (("llm/.*",), "gpu", "float32"), ((), "cpu", "float32")],
    ids=["published", "held so by training", "cpu"],
)
def test_a_run_is_used_in_the_type_that_it_was_trained_in(mesh, half, platform, dtype):
    """A base that training held in bfloat16 is no sign that the model computes in it."""
    config = with_lora(bfloat16_params=half)
    stored = state.flatten(abstract_of(with_lora(bfloat16_params=("llm/.*",)), mesh).params)
    assert restore.dtype_for_use(config.model, config.train, stored, platform) == dtype


@pytest.mark.parametrize(("platform", "dtype"), [("tpu", "bfloat16"), ("cpu", "float32")])
def test_a_run_in_bfloat16_is_used_in_float32_on_cpu(platform, dtype):
    config = tiny_config()
    model = dataclasses.replace(config.model, dtype="bfloat16")
    assert restore.dtype_for_use(model, config.train, {}, platform) == dtype
