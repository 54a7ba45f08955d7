"""On the 2 x 2 x 2 mesh; one compiled step serves all tests of a config."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.models import connectors, layers, vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import optim, state, step
from tests.conftest import random_batch, random_params, tiny_config, tiny_connector

FROZEN = "vision/"


def make(tx=None, connector: str = "align", llm=None, **train_changes):
    """A config, its decoder with the options `llm`, its mesh, a function that makes equal fresh states, and the compiled step."""
    config = tiny_config()
    model = dataclasses.replace(
        config.model,
        connector=tiny_connector(connector),
        llm=dataclasses.replace(config.model.llm, **(llm or {})),
    )
    config = dataclasses.replace(
        config, model=model, train=dataclasses.replace(config.train, **train_changes)
    )
    model = vlm.VLM(config.model)
    mesh = mesh_lib.make_mesh(config.mesh, config.model, config.train)
    tx = tx or optim.make_optimizer(config.optim, config.train.num_steps)
    with mesh_lib.use(mesh):
        abstract = state.abstract_state(model, config.train, tx, mesh)
        trainable = state.trainable_paths(config.train, config.stage, abstract.params)
        compiled = step.lower_train_step(model, config, tx, abstract, mesh).compile()
        drawn = random_params(model, random_batch(config))
        put = lambda x, like: jax.device_put(x, like.sharding)  # noqa: E731

        def fresh() -> state.TrainState:
            params = jax.tree.map(put, drawn, abstract.params)
            return state.TrainState(
                put(np.int32(0), abstract.step),
                params,
                state.init_opt_state(tx, trainable, abstract, params),
            )

    def run(live, batch):
        with mesh_lib.use(mesh):
            return compiled(live, sharding.put_batch(step.train_inputs(config.train, batch), mesh))

    return config, fresh, run


@pytest.fixture(scope="module")
def frozen_vision():
    return make(trainable=("connector/.*", "llm/.*"), patch_token_weight=0.5)


def snapshot(live: state.TrainState) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in state.flatten(live.params).items()}


def snapshot_tree(live: state.TrainState) -> state.Params:
    return state.unflatten(snapshot(live))


def test_frozen_parameters_stay_bit_identical_and_the_others_move(frozen_vision):
    config, fresh, run = frozen_vision
    live = fresh()
    before = snapshot(live)
    for seed in range(3):  # The first update has a learning rate of 0.
        live, metrics = run(live, random_batch(config, seed))
    after = snapshot(live)
    assert int(live.step) == 3
    for path in before:
        if path.startswith(FROZEN):
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
        else:
            assert not np.array_equal(after[path], before[path]), path
    assert int(metrics["num_updates"]) == 3


@pytest.mark.parametrize("name", [name for name in connectors.REGISTRY if name != "align"])
def test_every_connector_is_trained(name):
    """Without a distribution over words there is no patch loss, and all else is as with ALIGN."""
    config, fresh, run = make(tx=optax.sgd(optax.constant_schedule(1e-2)), connector=name)
    live = fresh()
    before = snapshot(live)
    live, metrics = run(live, random_batch(config))
    after = snapshot(live)
    assert (
        float(metrics["patch_loss"]) == 0
        and float(metrics["loss"]) == float(metrics["answer_loss"]) > 1
    )
    for path in before:
        # A bias of all keys moves no softmax.
        assert path.endswith("k/bias") or not np.array_equal(after[path], before[path]), path


@pytest.mark.parametrize(
    "llm",
    [
        {"qkv_bias": True},
        {"qk_norm": True},
        {"no_rope_every": 2},
        {"rope_scaling": config_lib.RopeScaling(type="yarn", factor=4.0, attention_factor=1.1)},
    ],
    ids=str,
)
def test_decoders_of_every_family_are_trained(llm):
    config, fresh, run = make(tx=optax.sgd(optax.constant_schedule(1e-2)), llm=llm)
    live = fresh()
    before = snapshot(live)
    live, metrics = run(live, random_batch(config))
    after = snapshot(live)
    assert float(metrics["answer_loss"]) > 1
    for path in before:
        # A bias of all keys moves no softmax.
        still = path.endswith("k/bias") and "vision" in path
        assert still or not np.array_equal(after[path], before[path]), path


def test_no_optimizer_state_is_allocated_for_frozen_parameters(frozen_vision):
    _, fresh, _ = frozen_vision
    live = fresh()
    trained = sum(
        x.size for path, x in state.flatten(live.params).items() if not path.startswith(FROZEN)
    )
    assert sum(x.size for x in jax.tree.leaves(live.opt_state) if x.ndim) == 2 * trained


def test_loss_is_answer_loss_plus_weighted_patch_loss(frozen_vision):
    config, fresh, run = frozen_vision
    _, metrics = run(fresh(), random_batch(config))
    assert float(metrics["patch_loss"]) > 0.1
    assert float(metrics["loss"]) == pytest.approx(
        float(metrics["answer_loss"]) + 0.5 * float(metrics["patch_loss"]), rel=1e-6
    )


def test_patch_loss_of_a_batch_without_labels_is_unknown_and_adds_nothing(frozen_vision):
    config, fresh, run = frozen_vision
    batch = random_batch(config)
    _, metrics = run(
        fresh(), batch | {"patch_loss_weights": np.zeros_like(batch["patch_loss_weights"])}
    )
    assert np.isnan(metrics["patch_loss"]) and float(metrics["loss"]) == float(
        metrics["answer_loss"]
    )


def test_z_loss_is_measured_and_added():
    """It is the mean square of log_sum_exp over the answer's tokens."""
    config, fresh, run = make(z_loss=0.5, patch_token_weight=0.0)
    batch = random_batch(config)
    live = fresh()
    inputs = step.train_inputs(config.train, batch)
    logits = vlm.VLM(config.model).apply({"params": snapshot_tree(live)}, inputs).logits
    squares = np.square(np.asarray(jax.nn.logsumexp(logits, axis=-1), np.float64))
    expected = (squares * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    _, metrics = run(live, batch)
    assert float(metrics["z_loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["loss"]) == pytest.approx(
        float(metrics["answer_loss"]) + 0.5 * expected, rel=1e-4
    )


def test_a_step_without_finite_gradient_changes_nothing_but_the_step(frozen_vision):
    config, fresh, run = frozen_vision
    live, _ = run(fresh(), random_batch(config))
    before = snapshot(live)
    opt_before = [np.asarray(x) for x in jax.tree.leaves(live.opt_state)]
    bad = random_batch(config, seed=1)
    bad["loss_weights"][0, np.argmax(bad["loss_weights"][0])] = np.inf
    live, metrics = run(live, bad)
    assert not np.isfinite(metrics["grad_norm"])
    assert int(live.step) == 2 and int(metrics["num_updates"]) == 1
    for path, value in snapshot(live).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    for new, old in zip(jax.tree.leaves(live.opt_state), opt_before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_another_shape_is_an_error_and_not_a_second_trace(frozen_vision):
    config, fresh, run = frozen_vision
    longer = dataclasses.replace(
        config, data=dataclasses.replace(config.data, seq_len=config.data.seq_len + 1)
    )
    with pytest.raises(TypeError):
        run(fresh(), random_batch(longer))


def test_four_parts_equal_the_large_batch():
    # Rows with few and with many answer tokens: a mean of the parts' means would differ.
    sgd = optax.sgd(optax.constant_schedule(1.0))
    results = []
    for grad_accum_steps in (1, 4):
        config, fresh, run = make(tx=sgd, batch_size=16, grad_accum_steps=grad_accum_steps)
        batch = random_batch(config)
        batch["loss_weights"][::4] *= np.arange(batch["loss_weights"].shape[1]) % 5 == 0
        batch["patch_loss_weights"][1::4] = 0.2
        live, metrics = run(fresh(), batch)
        results.append((snapshot(live), {name: float(value) for name, value in metrics.items()}))
    (whole, whole_metrics), (parts, parts_metrics) = results
    assert parts_metrics == pytest.approx(whole_metrics, rel=1e-5)
    # With SGD at rate 1 the parameters differ by the gradients.
    for path in whole:
        np.testing.assert_allclose(parts[path], whole[path], atol=1e-5, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("visual_source", "weight", "left_out"),
    [
        ("oracle", 1.0, {"tiles", "patch_loss_weights"}),
        ("pixels", 1.0, set()),
        ("pixels", 0.0, {"patch_label_ids", "patch_label_weights", "patch_loss_weights"}),
    ],
)
def test_only_the_arrays_that_a_stage_needs_are_sent(visual_source, weight, left_out):
    config = tiny_config()
    train = dataclasses.replace(
        config.train, visual_source=visual_source, patch_token_weight=weight
    )
    batch = random_batch(config)
    sent = step.train_inputs(train, batch)
    assert set(batch) - set(sent) == left_out


def test_without_the_answers_loss_the_patch_loss_alone_trains_and_no_text_is_sent():
    """Equal to the whole model's step on a batch without answers, and to one over a sample that is
    the whole vocabulary."""
    parts = {"trainable": ("vision/.*", "connector/.*")}
    alone = parts | {"answer_weight": 0.0}
    every = tiny_config().model.llm.unpadded_vocab_size
    results = []
    for changes in (
        alone | {"grad_accum_steps": 2},
        alone | {"sampled_entries": every},
        parts,
    ):
        config, fresh, run = make(tx=optax.sgd(optax.constant_schedule(1.0)), **changes)
        batch = random_batch(config)
        batch["loss_weights"][:] = 0
        sent = step.train_inputs(config.train, batch)
        live, metrics = run(fresh(), batch)
        results.append((set(sent), snapshot(live), metrics))
    (sent, alone, metrics), (_, sampled, _), (_, whole, _) = results
    assert sent == {"tiles", "patch_label_ids", "patch_label_weights", "patch_loss_weights"}
    assert metrics["loss"] == metrics["patch_loss"] > 0 and "answer_loss" not in metrics
    before = snapshot(fresh())
    for path in whole:
        for other in (alone, sampled):
            np.testing.assert_allclose(other[path], whole[path], atol=2e-6, rtol=2e-5, err_msg=path)
        assert np.array_equal(alone[path], before[path]) == path.startswith("llm/"), path


def test_the_loss_over_a_sample_is_the_trained_one_alone():
    """The validation step measures over the whole vocabulary."""
    config = tiny_config()
    patches = {"answer_weight": 0.0, "trainable": ("vision/.*", "connector/.*")}
    few, whole = (
        dataclasses.replace(config.train, **patches, sampled_entries=size) for size in (30, 0)
    )
    model = vlm.VLM(config.model)
    batch = jax.device_put(step.train_inputs(few, random_batch(config)))
    params = random_params(model, random_batch(config))
    losses = [step.whole_loss(model, train, params, batch) for train in (few, whole)]
    assert abs(losses[0] - losses[1]) > 1e-4
    sums = [step.make_eval_step(model, train)(params, batch) for train in (few, whole)]
    assert sums[0]["patch_sum"] == sums[1]["patch_sum"]


def test_means_divide_once_and_survive_no_weight():
    sums = {
        "answer_sum": 6.0,
        "correct_sum": 1.0,
        "answer_weight": 4.0,
        "patch_sum": 0.0,
        "patch_weight": 0.0,
    }
    assert step.means(sums) == {"answer_loss": 1.5, "token_accuracy": 0.25, "patch_loss": 0.0}


def test_without_jit_arrays_have_values_and_results_are_the_same(monkeypatch):
    """As configs/debug.py has it."""
    config = dataclasses.replace(tiny_config(), mesh=config_lib.MeshConfig(data=1))
    model = vlm.VLM(config.model)
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    batch = random_batch(config)
    seen = []
    sums = step._sums

    def spy(model, train, params, batch):
        seen.append(isinstance(batch["tokens"], jax.core.Tracer))
        return sums(model, train, params, batch)

    monkeypatch.setattr(step, "_sums", spy)
    found = []
    with mesh_lib.use(mesh_lib.single_device()) as mesh:
        params = random_params(model, batch)
        abstract = state.abstract_state(model, config.train, tx, mesh)
        for jit in (True, False):
            train = dataclasses.replace(config.train, jit=jit)
            changed = dataclasses.replace(config, train=train)
            _, eval_step = step.compile_steps(model, changed, tx, abstract, mesh)
            inputs = step.eval_inputs(train, batch)
            arrays = {name: jax.device_put(array) for name, array in inputs.items()}
            found.append(eval_step(params, arrays))
    assert seen == [True, True, False]  # Both steps are traced; the last is run.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *found)


def test_the_step_sums_gradients_of_kernels_in_the_type_chosen(monkeypatch):
    """A layer of each tower is traced once: 7 and 6 kernels, and those outside have theirs."""
    # For CPUs the results of all matmuls are float32, and rounded where bfloat16 is wanted.
    monkeypatch.setattr(layers, "mesh_platform", lambda: "tpu")

    def float32_results(dtype: str) -> int:
        """Matmuls of bfloat16 matrices whose results are float32."""
        config = tiny_config()
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, dtype="bfloat16"),
            train=dataclasses.replace(config.train, grad_reduce_dtype=dtype),
        )
        model = vlm.VLM(config.model)
        tx = optim.make_optimizer(config.optim, config.train.num_steps)
        with mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, config.train)) as mesh:
            abstract = state.abstract_state(model, config.train, tx, mesh)
            text = step.lower_train_step(model, config, tx, abstract, mesh).as_text()
        return len(re.findall(r"dot_general.*xbf16>, tensor<\w+xbf16>\) -> tensor<\w+xf32>", text))

    assert float32_results("float32") >= float32_results("bfloat16") + 7 + 6
