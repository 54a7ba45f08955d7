import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alignvlm_jax.config import MeshConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import optim, state
from tests.conftest import random_batch, tiny_config, tiny_connector

PATHS = (
    "vision/blocks/attn/q/kernel",
    "connector/w1/kernel",
    "llm/embed/table",
    "llm/blocks/attn_norm/scale",
)


def test_patterns_match_whole_paths():
    assert state.match_paths(("llm/.*", "connector/w1/kernel"), PATHS, "train.trainable") == set(
        PATHS[1:]
    )
    with pytest.raises(UserError, match=r"'llm' matches no parameter"):
        state.match_paths(("llm",), PATHS, "train.trainable")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("lm/.*", r"did you mean 'llm/\.\*'"),
        ("connector/w1/kernal", "did you mean 'connector/w1/kernel'"),
        ("x(", "regular"),
    ],
)
def test_a_pattern_without_a_match_is_an_error_that_names_the_nearest(pattern, hint):
    with pytest.raises(UserError, match=hint):
        state.match_paths((pattern,), PATHS, "train.load")


def test_split_and_merge_are_inverse():
    params = state.unflatten({path: np.full(2, i) for i, path in enumerate(PATHS)})
    chosen = set(PATHS[:2])
    first, second = state.split(params, chosen)
    assert set(state.flatten(first)) == chosen
    assert set(state.flatten(second)) == set(PATHS[2:])
    merged = state.flatten(state.merge(first, second))
    assert {path: x[0] for path, x in merged.items()} == {path: i for i, path in enumerate(PATHS)}


def test_abstract_state_is_sharded_and_has_optimizer_state_for_trainable_parameters_only(
    config, mesh
):
    config = tiny_config(
        train=dataclasses.replace(config.train, trainable=("connector/.*", "llm/embed/table"))
    )
    abstract = state.abstract_state(
        vlm.VLM(config.model),
        config.train,
        optim.make_optimizer(config.optim, config.train.num_steps),
        mesh,
    )
    trained = set(
        state.flatten(
            state.split(
                abstract.params, state.trainable_paths(config.train, config.stage, abstract.params)
            )[0]
        )
    )
    assert trained and all(path.startswith(("connector/", "llm/embed/")) for path in trained)
    moments = [x for x in jax.tree.leaves(abstract.opt_state) if x.ndim]
    assert len(moments) == 2 * len(trained)
    w2 = abstract.params["connector"]["w2"]["kernel"]
    assert w2.sharding.spec == PartitionSpec("fsdp", "tensor")
    same_shape = [x for x in moments if x.shape == w2.shape]
    assert same_shape and all(x.sharding == w2.sharding for x in same_shape)


@pytest.mark.parametrize("name", ["align", "perceiver"])
@pytest.mark.parametrize("size", [1, 2], ids=["one device", "2 x 2 x 2"])
def test_initial_parameters_are_bit_for_bit_those_over_a_batch_of_the_stage(config, name, size):
    """They are initialised over a small batch of zeros; what a stage trains on is none of it."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, connector=tiny_connector(name)),
        mesh=MeshConfig(data=size, fsdp=size, tensor=size),
    )
    model = vlm.VLM(config.model)
    devices = jax.devices()[: size**3]
    with mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, None, devices)) as mesh:
        abstract = state.abstract_params(model, mesh)
        rng = jax.random.key(config.seed)
        small = state.init_params(model, abstract, set(state.flatten(abstract)), rng)

        def over_the_stages_batch(rng: jax.Array) -> state.Params:
            params = model.init(rng, random_batch(config))["params"]
            return sharding.unbox(vlm.with_llm_derived(config.model, params))

        shardings = state.shardings_of(abstract)
        large = jax.jit(over_the_stages_batch, out_shardings=shardings)(rng)
    large = state.flatten(large)
    for path, x in state.flatten(small).items():
        np.testing.assert_array_equal(x, large[path], err_msg=path)


@pytest.mark.parametrize(
    ("changes", "matched"),
    [
        ({"visual_source": "oracle"}, "connector/w1/kernel"),
        ({"visual_source": "oracle", "trainable": ("llm/.*", "vision/.*")}, "vision/pos_embed"),
        ({"answer_weight": 0.0}, "llm/embed/table"),
    ],
)
def test_what_gets_no_gradient_is_not_left_to_decay(changes, matched):
    config = tiny_config()
    train = dataclasses.replace(config.train, **changes)
    paths = ("vision/pos_embed", "connector/w1/kernel", "llm/embed/table")
    params = state.unflatten({path: np.zeros(1) for path in paths})
    with pytest.raises(UserError, match=f"matches {matched} in stage 'train', which gets no gra"):
        state.trainable_paths(train, config.stage, params)
    own = [path for path in paths if path.startswith("llm/") == (train.visual_source == "oracle")]
    train = dataclasses.replace(train, trainable=tuple(own))
    assert state.trainable_paths(train, config.stage, params) == set(own)


def test_factors_are_trained_where_their_kernels_have_gradients():
    """Those of the LLM by oracle visual tokens, and not by patch labels alone."""
    config = tiny_config()
    paths = ("vision/pos_embed", "llm/blocks/attn/q/kernel", "lora/llm/blocks/attn/q/kernel/a")
    params = state.unflatten({path: np.zeros(1) for path in paths})
    oracle = dataclasses.replace(config.train, visual_source="oracle", trainable=())
    assert state.trainable_paths(oracle, config.stage, params) == {paths[2]}
    patches = dataclasses.replace(config.train, answer_weight=0.0, trainable=("vision/.*",))
    with pytest.raises(UserError, match=rf"config\.lora\.targets matches {paths[2]} in stage"):
        state.trainable_paths(patches, config.stage, params)


def test_no_trainable_parameter_is_an_error():
    config = tiny_config(train=tiny_config().train.__class__(trainable=()))
    with pytest.raises(UserError, match="empty in stage 'train': nothing would be trained"):
        state.trainable_paths(config.train, config.stage, {"a": {"kernel": np.zeros(1)}})
