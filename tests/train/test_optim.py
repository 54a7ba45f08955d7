import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignvlm_jax.config import MeshConfig, OptimConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import aot, hardware
from alignvlm_jax.train import optim, state, step
from tests.conftest import tiny_config, tiny_connector
from tests.train import fake_run


def test_schedule_warms_up_linearly_and_falls_to_the_final_fraction():
    config = tiny_config(optim=OptimConfig(learning_rate=0.4, warmup_steps=10, final_fraction=0.1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=110))
    schedule = optim.make_schedule(config.optim, config.train.num_steps)
    halfway = 0.04 + 0.36 / 2
    expected = {0: 0.0, 5: 0.2, 10: 0.4, 60: halfway, 110: 0.04, 500: 0.04}
    for at, rate in expected.items():
        assert float(schedule(at)) == pytest.approx(rate, abs=1e-6), at


def test_a_stage_shorter_than_its_warmup_still_has_a_schedule():
    config = tiny_config(optim=OptimConfig(learning_rate=1.0, warmup_steps=100))
    assert float(optim.make_schedule(config.optim, config.train.num_steps)(3)) == pytest.approx(1.0)


def test_decay_is_of_matrices_only():
    config = tiny_config()
    boxed = jax.eval_shape(lambda: vlm.init_params(vlm.VLM(config.model), jax.random.key(0)))
    params = sharding.unbox(boxed)
    decays = state.flatten(optim.decay_mask(params))
    for path, shape in state.flatten(params).items():
        folder, name = path.rsplit("/", 1)
        is_layer_matrix = len(shape.shape) >= 2 + ("blocks" in path)
        assert decays[path] == (is_layer_matrix and name not in ("bias", "positions")), path
        assert not (decays[path] and "norm" in folder), path


def test_decay_reaches_the_update_and_norms_stay():
    config = tiny_config(optim=OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5))
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    params = {"mlp": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones((3, 2))}}
    updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0.0)
    assert int(optim.num_updates(opt_state)) == 1


def test_gradients_are_clipped_by_their_global_norm():
    config = tiny_config(
        optim=OptimConfig(learning_rate=2e-3, clip_norm=1.0, warmup_steps=0, weight_decay=0.0)
    )
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    params = {"a": {"bias": jnp.zeros(2)}}
    _, opt_state = tx.update({"a": {"bias": jnp.array([30.0, 40.0])}}, tx.init(params), params)
    first_moment = opt_state[1][0].mu["a"]["bias"]
    np.testing.assert_allclose(
        first_moment, (1 - config.optim.b1) * jnp.array([0.6, 0.8]), rtol=1e-5
    )


def test_parts_have_rates_of_their_own():
    """Decay, too: it is scaled by the rate."""
    plain = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    params = {part: {"kernel": jnp.ones((2, 2))} for part in ("vision", "connector", "llm")}
    grads = jax.tree.map(lambda x: 0.3 * x, params)

    def updates(config: OptimConfig) -> dict:
        tx = optim.make_optimizer(config, num_steps=4)
        new, opt_state = tx.update(grads, tx.init(params), params)
        assert int(optim.num_updates(opt_state)) == 1
        return new

    before = updates(plain)
    after = updates(dataclasses.replace(plain, learning_rate_scale={"vision": 0.2, "llm": 0.0}))
    np.testing.assert_allclose(
        after["vision"]["kernel"], 0.2 * before["vision"]["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(after["connector"]["kernel"], before["connector"]["kernel"])
    np.testing.assert_array_equal(after["llm"]["kernel"], 0.0)


def test_bfloat16_moments_are_stored_so_and_follow_those_of_float32():
    config = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.1, clip_norm=1e6)
    half = dataclasses.replace(config, moment_dtype="bfloat16")
    rng = np.random.default_rng(0)
    params = {"llm": {"kernel": jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)}}
    results = []
    for one in (config, half):
        tx = optim.make_optimizer(one, num_steps=30)
        now = params
        opt_state = tx.init(now)
        draws = np.random.default_rng(1)
        for _ in range(20):
            grads = {"llm": {"kernel": jnp.asarray(draws.standard_normal((8, 6)), jnp.float32)}}
            updates, opt_state = tx.update(grads, opt_state, now)
            now = optax.apply_updates(now, updates)
        results.append((now, opt_state))
    (exact, _), (rounded, kept) = results
    moments = [x for x in jax.tree.leaves(kept) if x.ndim]
    assert len(moments) == 2 and all(x.dtype == jnp.bfloat16 for x in moments)
    assert int(optim.num_updates(kept)) == 20
    moved = np.abs(exact["llm"]["kernel"] - params["llm"]["kernel"])
    error = np.abs(exact["llm"]["kernel"] - rounded["llm"]["kernel"])
    # Rounding is by at most 1/256 of each moment, once a step.
    assert error.max() > 0 and error.mean() < 0.02 * moved.mean()


def test_adafactor_is_the_papers_with_our_decay_and_schedule():
    """Against the equations of arXiv 1804.04235, in NumPy, over three steps of one matrix that is
    factored and one vector that is not."""
    config = OptimConfig(
        name="adafactor", learning_rate=0.01, warmup_steps=0, weight_decay=0.5, clip_norm=1e9
    )
    tx = optim.make_optimizer(config, num_steps=10)
    schedule = optim.make_schedule(config, 10)
    rng = np.random.default_rng(0)
    shapes = {"kernel": (160, 130), "bias": (160,)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    now = jax.tree.map(jnp.asarray, {"llm": params})
    opt_state = tx.init(now)
    expected = {name: x.astype(np.float64) for name, x in params.items()}
    row, column, vector = np.zeros(160), np.zeros(130), np.zeros(160)
    for t in range(3):
        # Of a gradient that grows fivefold the update is too large, and is scaled down.
        size = (1, 1, 5)[t]
        grads = {
            name: (size * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        updates, opt_state = tx.update(jax.tree.map(jnp.asarray, {"llm": grads}), opt_state, now)
        now = optax.apply_updates(now, updates)
        decay = 1 - (t + 1) ** -0.8
        square = {name: np.square(x.astype(np.float64)) + 1e-30 for name, x in grads.items()}
        row = decay * row + (1 - decay) * square["kernel"].mean(1)
        column = decay * column + (1 - decay) * square["kernel"].mean(0)
        vector = decay * vector + (1 - decay) * square["bias"]
        scaled = {
            "kernel": grads["kernel"] / np.sqrt(np.outer(row, column) / row.mean()),
            "bias": grads["bias"] / np.sqrt(vector),
        }
        rate = float(schedule(t))
        for name, update in scaled.items():
            update = update / max(1.0, np.sqrt(np.square(update).mean()))
            decayed = 0.5 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - rate * (update + decayed)
    for name, value in expected.items():
        np.testing.assert_allclose(now["llm"][name], value, atol=2e-6, err_msg=name)
    assert int(optim.num_updates(opt_state)) == 3
    # A row and a column of the matrix, the vector; arrays of one element stand for what is not.
    sizes = sorted(x.size for x in jax.tree.leaves(opt_state) if x.size > 1)
    assert sizes == [130, 160, 160]


def orthogonalised(x: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps of Muon's quintic (Jordan, 2024), of one matrix, in float64."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_is_each_layers_own_and_adamw_the_rest():
    """Against the equations in NumPy, over two steps: queries [L, D, H, h] of two layers are two
    matrices [D, H h], outputs [L, H, h, D] two [H h, D]; the table and the norm are AdamW's."""
    config = OptimConfig(
        name="muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.5, clip_norm=1e9
    )
    schedule = optim.make_schedule(config, 10)
    rng = np.random.default_rng(0)
    shapes = {
        "blocks/attn/q/kernel": (2, 6, 4, 5),
        "blocks/attn/o/kernel": (2, 4, 5, 6),
        "blocks/mlp/gate/kernel": (2, 6, 8),
        "head/kernel": (6, 9),
        "embed/table": (9, 6),
        "final_norm/scale": (6,),
    }
    flat = {"blocks/attn/q/kernel": (6, 20), "blocks/attn/o/kernel": (20, 6)}
    flat["blocks/mlp/gate/kernel"] = (6, 8)
    start = {f"llm/{path}": rng.standard_normal(shape) for path, shape in shapes.items()}
    draws = [
        {path: rng.standard_normal(x.shape).astype(np.float32) for path, x in start.items()}
        for _ in range(2)
    ]
    params = state.unflatten({path: jnp.asarray(x, jnp.float32) for path, x in start.items()})

    def run(one: OptimConfig) -> dict[str, jax.Array]:
        tx = optim.make_optimizer(one, num_steps=10)
        now, opt_state = params, tx.init(params)
        for grads in draws:
            updates, opt_state = tx.update(state.unflatten(dict(grads)), opt_state, now)
            now = optax.apply_updates(now, updates)
        assert int(optim.num_updates(opt_state)) == 2
        return state.flatten(now)

    found, adamw = run(config), run(dataclasses.replace(config, name="adamw"))
    for path, sides in flat.items():
        path = f"llm/{path}"
        expected = start[path].reshape(2, *sides).astype(np.float64)
        mean = np.zeros_like(expected)
        for t, grads in enumerate(draws):
            gradient = grads[path].reshape(expected.shape)
            mean = 0.95 * mean + 0.05 * gradient
            ahead = 0.95 * mean / (1 - 0.95 ** (t + 2)) + 0.05 * gradient / (1 - 0.95 ** (t + 1))
            update = np.stack(
                [orthogonalised(x.T).T if sides[0] > sides[1] else orthogonalised(x) for x in ahead]
            )
            update *= 0.2 * np.sqrt(max(sides))
            expected -= float(schedule(t)) * (update + 0.5 * expected)
        np.testing.assert_allclose(
            found[path].reshape(2, *sides), expected, atol=2e-5, err_msg=path
        )
    for path in ("llm/head/kernel", "llm/embed/table", "llm/final_norm/scale"):
        np.testing.assert_array_equal(found[path], adamw[path], err_msg=path)


def test_muon_takes_the_hidden_matrices_of_every_connector():
    """All kernels of the towers' layers; of connectors none onto a vocabulary, and none that is a
    convolution over patches."""
    left = {
        "align": {"w2/kernel"},
        "mlp": set(),
        "perceiver": set(),
        "ovis": {"head/kernel"},
        "h_reducer": {"conv1/kernel", "conv2/kernel"},
        "c_abstractor": {"before/conv2/kernel", "after/conv2/kernel"},
    }
    for name, others in left.items():
        model = dataclasses.replace(tiny_config().model, connector=tiny_connector(name))
        boxed = jax.eval_shape(
            lambda model=model: vlm.init_params(vlm.VLM(model), jax.random.key(0))
        )
        kernels = {path for path in state.flatten(boxed) if path.endswith("/kernel")}
        by_adamw = {path for path in kernels if optim._hidden_axes(path) is None}
        expected = {f"connector/{path}" for path in others} | {"vision/patch_embed/kernel"}
        assert by_adamw == expected, name


def test_muon_of_nothing_hidden_is_refused():
    tx = optim.make_optimizer(OptimConfig(name="muon", learning_rate=1.0), num_steps=4)
    with pytest.raises(UserError, match=r"optim\.name is 'muon'.*none of them; use 'adamw'"):
        tx.init({"connector": {"w2": {"kernel": jnp.ones((2, 3))}}})


def test_muon_keeps_one_mean_of_a_matrix_which_lies_as_its_parameter(mesh):
    """What `plan` says of the optimizer is of this state."""
    config = tiny_config()
    model = vlm.VLM(config.model)

    def of(name: str) -> dict[str, jax.ShapeDtypeStruct]:
        tx = optim.make_optimizer(dataclasses.replace(config.optim, name=name), 4)
        abstract = state.abstract_state(model, config.train, tx, mesh)
        paths = jax.tree_util.tree_leaves_with_path(abstract.opt_state)
        return abstract.params, {sharding.path_name(path): x for path, x in paths}

    params, muon = of("muon")
    _, adamw = of("adamw")
    params = state.flatten(params)
    for path, param in params.items():
        own = [x for name, x in muon.items() if name.endswith(f"/{path}")]
        assert len(own) == (2 if optim._hidden_axes(path) is None else 1), path
        assert all(x.shape == param.shape and x.sharding == param.sharding for x in own), path
    hidden = [x for path, x in params.items() if optim._hidden_axes(path)]
    spared = aot.gib_of_a_device(adamw) - aot.gib_of_a_device(muon)
    # Beside the means it has a count and three coefficients.
    assert spared * aot.GIB == pytest.approx(aot.gib_of_a_device(hidden) * aot.GIB, abs=32)


def test_rates_by_component_hold_with_every_optimizer():
    matrix = {"mlp": {"up": {"kernel": jnp.ones((130, 140))}}}
    params = {part: matrix for part in ("llm", "lora")}
    grads = jax.tree.map(lambda x: 0.3 * x, params)
    for changes in ({}, {"moment_dtype": "bfloat16"}, {"name": "adafactor"}, {"name": "muon"}):
        config = OptimConfig(
            learning_rate=0.1, warmup_steps=0, learning_rate_scale={"llm": 0.0}, **changes
        )
        tx = optim.make_optimizer(config, num_steps=4)
        updates, opt_state = tx.update(grads, tx.init(params), params)
        updates = {part: x["mlp"]["up"]["kernel"] for part, x in updates.items()}
        assert not updates["llm"].any() and updates["lora"].any()
        assert int(optim.num_updates(opt_state)) == 1


@pytest.mark.parametrize("changes", [{"name": "adafactor"}, {"moment_dtype": "bfloat16"}])
def test_state_lies_over_the_mesh_as_the_parameters_do(changes, mesh):
    """What Adafactor keeps of a matrix lacks one of its axes, and has the shardings of the rest."""
    config = tiny_config(optim=OptimConfig(learning_rate=1e-3, **changes))
    llm = dataclasses.replace(config.model.llm, vocab_size=256, width=128, mlp_width=256)
    model = vlm.VLM(dataclasses.replace(config.model, llm=llm))
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    abstract = state.abstract_state(model, config.train, tx, mesh)
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(abstract.opt_state):
        found.setdefault(sharding.path_name(path).split("/", 2)[-1], x)
    if changes.get("name") != "adafactor":
        mu = (
            found["0/mu/llm/embed/table"]
            if "0/mu/llm/embed/table" in found
            else found["mu/llm/embed/table"]
        )
        assert mu.dtype == jnp.bfloat16 and tuple(mu.sharding.spec) == ("tensor", "fsdp")
        return
    by_name = {
        name.split("/", 1)[-1] if name[0].isdigit() else name: x for name, x in found.items()
    }
    row, column = by_name["v_row/llm/embed/table"], by_name["v_col/llm/embed/table"]
    # [V, D] of vocab over tensor and embed over fsdp: rows lack the larger axis, V.
    assert (row.shape, tuple(row.sharding.spec)) == ((128,), ("fsdp",))
    assert (column.shape, tuple(column.sharding.spec)) == ((256,), ("tensor",))
    gate = by_name["v_col/llm/blocks/mlp/gate/kernel"]
    assert (gate.shape, tuple(gate.sharding.spec)) == ((2, 256), (None, "tensor"))
    assert by_name["v/llm/blocks/mlp/gate/kernel"].shape == (1,)
    # Of all moments a fraction of a percent is left; what is not factored is small.
    whole = sum(x.size for x in jax.tree.leaves(abstract.params))
    assert sum(x.size for x in jax.tree.leaves(abstract.opt_state)) < 0.1 * whole


@pytest.mark.parametrize(
    "changes",
    [{"name": "adafactor"}, {"moment_dtype": "bfloat16"}, {"name": "muon"}],
    ids=lambda c: str(*c.values()),
)
def test_a_resumed_run_is_bit_for_bit_the_same_with_every_optimizer(tmp_path, monkeypatch, changes):
    # The tiny model's matrices are factored, too.
    monkeypatch.setattr(optim, "MIN_FACTORED", 8)
    configs = tuple(
        dataclasses.replace(one, optim=dataclasses.replace(one.optim, warmup_steps=0, **changes))
        for one in fake_run.stages()
    )
    fake_run.train(tmp_path / "whole", configs=configs)
    with pytest.raises(UserError):
        stopping = fake_run.Batches(fake_run.send(signal.SIGINT, at=6))
        fake_run.train(tmp_path / "parts", stopping, configs=configs)
    fake_run.train(tmp_path / "parts", configs=configs)
    whole, parts = (fake_run.stored(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    table = "['llm']['embed']['table']"
    state_of = {name: x for name, x in whole.items() if "opt_state" in name and table in name}
    if changes.get("name") == "muon":
        assert len(state_of) == 2
        assert sum("mu" in name and "attn" in name and "opt_state" in name for name in whole)
    elif changes.get("name"):
        assert {x.shape for x in state_of.values()} == {(16,), (32,), (1,)}
    else:
        assert len(state_of) == 2 and all(x.dtype == jnp.bfloat16 for x in state_of.values())


# In the memory of the host.


def test_an_offloaded_run_is_the_same_and_resumes(tmp_path):
    """Bit for bit, against a run with its state on the devices, whose checkpoints it reads."""
    plain = fake_run.stages()
    offloaded = tuple(
        dataclasses.replace(one, train=dataclasses.replace(one.train, offload_optimizer=True))
        for one in plain
    )
    fake_run.train(tmp_path / "plain", configs=plain)
    with pytest.raises(UserError):
        stopping = fake_run.Batches(fake_run.send(signal.SIGINT, at=6))
        fake_run.train(tmp_path / "offloaded", stopping, configs=offloaded)
    fake_run.train(tmp_path / "offloaded", configs=offloaded)
    expected, found = (fake_run.stored(tmp_path / name) for name in ("plain", "offloaded"))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)


@pytest.mark.skipif(
    not hardware.has_tpu_compiler(), reason="libtpu is not installed (requirements-tpu.txt)"
)
def test_a_tpus_program_takes_offloaded_state_from_the_host():
    """And hands it back there; `plan` has it apart from what the device holds."""
    base = tiny_config()
    config = dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, offload_optimizer=True),
        mesh=MeshConfig(data=1, fsdp=4, tensor=1),
    )
    devices = hardware.compile_only_devices(hardware.parse_topology("v5e:2x2"))
    model = vlm.VLM(config.model)
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    with mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, None, devices)) as mesh:
        abstract = state.abstract_state(model, config.train, tx, mesh)
        compiled = step.lower_train_step(model, config, tx, abstract, mesh).compile()
    memory = compiled.memory_analysis()
    on_host = aot.gib_of_a_device(abstract.opt_state, on_host=True) * aot.GIB
    moments = 2 * aot.gib_of_a_device(abstract.params) * aot.GIB
    assert on_host == pytest.approx(moments)
    # With the padding of small arrays; parameters, as many again, and a batch are the device's.
    assert on_host <= memory.host_argument_size_in_bytes
    assert memory.argument_size_in_bytes < memory.host_argument_size_in_bytes
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    assert aot.gib_of_a_device(abstract.opt_state) * aot.GIB < 16
