import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignvlm_jax.config import OptimConfig
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import optim, state
from tests.conftest import tiny_config


def test_schedule_warms_up_linearly_and_falls_to_the_final_fraction():
    config = tiny_config(optim=OptimConfig(learning_rate=0.4, warmup_steps=10, final_fraction=0.1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=110))
    schedule = optim.make_schedule(config.optim, config.train.num_steps)
    halfway = 0.04 + 0.36 / 2
    expected = {0: 0.0, 5: 0.2, 10: 0.4, 60: halfway, 110: 0.04, 500: 0.04}
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6), step


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
