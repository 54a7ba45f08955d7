"""A tower in memory: what is written by the tables is read back bit for bit, and every complaint
names its tensor."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import state
from alignvlm_jax.weights import load, mapping, source
from alignvlm_jax.weights.families import siglip
from alignvlm_jax.weights.families.llama import Llama
from alignvlm_jax.weights.formats import big_vision
from alignvlm_jax.weights.source import Arrays, Derived, Made, Tensor, Tower
from tests.conftest import random_batch, random_params, tiny_config

LLAMA = Llama()


def config_of(tied: bool):
    config = tiny_config()
    llm = dataclasses.replace(config.model.llm, tie_embeddings=tied)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))


def params_of(config) -> dict[str, np.ndarray]:
    return state.flatten(random_params(vlm.VLM(config.model), random_batch(config)))


def published(entries, params, dtype=np.float32) -> dict[str, np.ndarray]:
    return {
        name: view.astype(dtype)
        for entry in entries
        for name, view in zip(
            entry.names(params[entry.path].shape), entry.views(params[entry.path]), strict=True
        )
    }


def wanted_of(config) -> dict:
    mesh = mesh_lib.make_mesh(config.mesh, config.model, config.train)
    return state.flatten(state.abstract_params(vlm.VLM(config.model), mesh))


def llm_tower(config, arrays) -> Tower:
    return Tower(
        Arrays("weights.bin", arrays),
        config.model.llm,
        LLAMA.entries(config.model.llm),
        ignored=(r".*\.inv_freq",),
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_the_table_writes_is_loaded_bit_for_bit(tied, dtype, monkeypatch):
    # Several blocks a tensor, and heads that a block cuts.
    monkeypatch.setattr(source, "BLOCK_BYTES", 100)
    config = config_of(tied)
    params = params_of(config)
    wanted = wanted_of(config)
    tower = llm_tower(config, published(LLAMA.entries(config.model.llm), params, dtype))
    assert load.check_tower(tower, wanted) == []
    loaded = load.load_tower(tower, wanted)
    assert loaded.keys() == {path for path in params if path.startswith("llm/")}
    for path, array in loaded.items():
        assert array.sharding == wanted[path].sharding and array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), params[path].astype(dtype))


@pytest.mark.parametrize("table", [siglip.table(), big_vision.table(True), big_vision.table(False)])
def test_vision_tables_cover_the_encoder(table):
    config = config_of(True)
    params = params_of(config)
    arrays = published(table, params)
    loaded = load.load_tower(
        Tower(Arrays("weights.bin", arrays), config.model.vision, table), wanted_of(config)
    )
    assert loaded.keys() == {path for path in params if path.startswith("vision/")}
    for path, array in loaded.items():
        np.testing.assert_array_equal(np.asarray(array), params[path])


def test_axes_of_a_kernel():
    """By hand, not by the table that is tested: rows are outputs, head by head."""
    kernel = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    (weight,) = mapping.Entry("q", "w", "DHh -> (Hh)D").views(kernel)
    assert weight.shape == (12, 2) and weight[4 * 1 + 2, 1] == kernel[1, 1, 2]
    (weight,) = mapping.Entry("patch", "w", "yxCE -> ECyx").views(
        np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    )
    assert weight.shape == (5, 4, 2, 3) and weight[4, 3, 1, 2] == 119
    with pytest.raises(ValueError, match="every axis"):
        mapping.Entry("q", "w", "DHh -> HD").views(kernel)


def changed(change) -> Tower:
    config = config_of(False)
    arrays = published(LLAMA.entries(config.model.llm), params_of(config))
    change(arrays)
    return llm_tower(config, arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("model.norm.weight"), r"weights\.bin lacks 1 tensor: model\.norm\.weight"),
        (
            lambda a: a.update(
                {"model.layers.1.mlp.up_proj.weight": np.zeros((3, 16), np.float32)}
            ),
            r"tensor model\.layers\.1\.mlp\.up_proj\.weight is \(3, 16\); .* it must be \(32, 16\)",
        ),
        (
            lambda a: a.update({"model.extra.weight": np.zeros(2, np.float32)}),
            r"holds what no parameter of ours is: 1 tensor: model\.extra\.weight",
        ),
        (
            lambda a: [a.pop(name) for name in list(a) if "layers" in name],
            r"lacks 18 tensors: .* and 10 more",
        ),
    ],
)
def test_complaints_before_anything_is_read(change, message):
    with pytest.raises(UserError, match=message):
        load.check_tower(changed(change), wanted_of(config_of(False)))


def test_known_tensors_are_ignored():
    tower = changed(
        lambda a: a.update({"model.layers.0.rotary_emb.inv_freq": np.zeros(2, np.float32)})
    )
    assert load.check_tower(tower, wanted_of(config_of(False))) == [
        "model.layers.0.rotary_emb.inv_freq"
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(value):
    def spoil(arrays):
        arrays["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    with pytest.raises(
        UserError,
        match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight holds numbers that are not",
    ):
        load.load_tower(changed(spoil), wanted_of(config_of(False)))


def test_derived_tensors_replace_what_they_use():
    base = Arrays(
        "base", {"a": np.ones((2, 3), np.float32), "b": np.full(3, 2, np.float32), "c": np.zeros(1)}
    )
    derived = Derived(
        base, {"ab": Made(Tensor((2, 3), np.dtype(np.float32)), ("a", "b"), lambda a, b: a * b)}
    )
    assert derived.tensors.keys() == {"ab", "c"}
    np.testing.assert_array_equal(source.read(derived, "ab"), np.full((2, 3), 2))
    np.testing.assert_array_equal(source.read(derived, "c"), np.zeros(1))


def test_no_parameter_is_whole_on_one_device():
    config = config_of(True)
    mesh = mesh_lib.widest(config.model)
    assert mesh.shape["fsdp"] == jax.device_count() == 8
    for path, x in state.flatten(state.abstract_params(vlm.VLM(config.model), mesh)).items():
        if path.endswith(("kernel", "table")):
            assert np.prod(x.sharding.shard_shape(x.shape)) * 8 == np.prod(x.shape), path
