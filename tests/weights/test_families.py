"""What the registry answers: of which family a folder, a GGUF or a config is, and that each family's
table, config and decoder agree with each other."""

import ast
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import LLMConfig, ModelConfig, RopeScaling
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import flops
from alignvlm_jax.train import state
from alignvlm_jax.weights import export, families, load, towers
from alignvlm_jax.weights.families.base import Fields
from alignvlm_jax.weights.source import Arrays, Tower
from tests.conftest import random_batch, random_params, tiny_config
from tests.weights import folders

FAMILIES = pytest.mark.parametrize("family", families.LLMS, ids=lambda family: family.model_type)


def config_of(family, **changes) -> config_lib.Config:
    """A tiny model with the decoder of a family."""
    config = tiny_config()
    llm = dataclasses.replace(config.model.llm, **family.traits, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))


def abstract_of(config: config_lib.Config, **sizes: int) -> dict[str, jax.ShapeDtypeStruct]:
    mesh_sizes = dataclasses.replace(config.mesh, **sizes)
    config = dataclasses.replace(config, mesh=mesh_sizes)
    mesh = mesh_lib.make_mesh(config.mesh, config.model, config.train)
    return state.flatten(state.abstract_params(vlm.VLM(config.model), mesh))


@FAMILIES
@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling(factor=8.0, original_length=16),
        RopeScaling(type="linear", factor=2.0),
        RopeScaling(
            type="yarn", factor=4.0, high_freq_factor=32.0, original_length=16, attention_factor=1.1
        ),
    ],
    ids=str,
)
def test_what_is_exported_is_read_as_the_same_sizes(family, scaling, tmp_path):
    llm = config_of(family, rope_scaling=scaling, norm_eps=1e-3, rope_theta=300.0).model.llm
    written = json.loads(json.dumps(family.hf_config(llm)))
    writer = families.llm_of(llm)
    # A family without a trait of its own is written as the one that it is.
    assert writer is family if family.traits else writer is families.LLMS[0]
    assert family.read(Fields(tmp_path / "config.json", written)) == llm
    assert written["architectures"] == [family.class_name]


@FAMILIES
def test_the_table_covers_the_decoder_and_is_loaded_bit_for_bit(family):
    config = config_of(family)
    params = state.flatten(random_params(vlm.VLM(config.model), random_batch(config)))
    entries = family.entries(config.model.llm)
    arrays = {
        name: view
        for entry in entries
        for name, view in zip(
            entry.names(params[entry.path].shape), entry.views(params[entry.path]), strict=True
        )
    }
    tower = Tower(Arrays("weights.bin", arrays), config.model.llm, entries)
    loaded = load.load_tower(tower, abstract_of(config))
    assert loaded.keys() == {path for path in params if path.startswith("llm/")}
    for path, array in loaded.items():
        np.testing.assert_array_equal(np.asarray(array), params[path])


@FAMILIES
def test_every_family_is_sharded_and_counted(family):
    """Biases lie over heads as their kernels do, the norms' scales are on every device; neither
    multiplies matrices."""
    config = config_of(family)
    for path, x in abstract_of(config, data=2, fsdp=2, tensor=2).items():
        sharded = [axis for axis in x.sharding.spec if axis is not None]
        if path.startswith("llm/") and path.endswith("bias"):
            assert sharded == ["tensor"] and x.shape[1:] == x.shape[-2:]
        if path.endswith("_norm/scale"):
            assert sharded == []
    counted, plain = (
        flops.step_flops(one, state.unflatten(abstract_of(one))) for one in (config, tiny_config())
    )
    assert counted == plain and plain["llm"] > 0


def test_no_family_is_named_where_the_registry_answers():
    names = {family.model_type for family in families.LLMS}
    names |= {name for family in families.VISION for name in family.model_types}
    names |= {family.class_name for family in (*families.LLMS, *families.VISION)}
    package = pathlib.Path(families.__file__).parents[1]
    files = ("export", "initial", "load", "mapping", "source", "towers", "formats/gguf")
    for file in files:
        tree = ast.parse((package / f"{file}.py").read_text())
        constants = {getattr(node, "value", None) for node in ast.walk(tree)}
        assert not {value for value in constants if isinstance(value, str)} & names, file


def test_a_config_of_no_family_is_not_exported():
    llm = dataclasses.replace(tiny_config().model.llm, qkv_bias=True, qk_norm=True)
    with pytest.raises(
        UserError,
        match=r"^llm: no family has config\.model\.llm\.qk_norm True, config\.model\.llm\.qkv_bias "
        r"True together; written are: LlamaForCausalLM, .*; leave it out by --components=connector$",
    ):
        export.check(ModelConfig(llm=llm), ("llm", "connector"))


def test_a_config_from_before_the_options_has_none_of_them():
    config = tiny_config()
    (stage,) = config_lib.to_json((config,))
    for name in ("qkv_bias", "qk_norm", "no_rope_every"):
        assert not stage["model"]["llm"].pop(name)
    for name in ("type", "attention_factor"):
        del stage["model"]["llm"]["rope_scaling"][name]
    assert config_lib.from_json([stage]) == (config,)
    assert config_lib.current_form([stage]) == config_lib.to_json((config,))


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        (
            "qwen2, untied",
            {"use_sliding_window": True},
            r"a sliding_window of 8 tokens of the 64 of max_position_embeddings.* to 8$",
        ),
        (
            "qwen3, tied",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"config\.json: layer_types names 'sliding_attention'; read are: 'full_attention'",
        ),
        ("qwen2, tied", {"num_key_value_heads": None}, r"does not say num_key_value_heads"),
        ("qwen3, untied", {"attention_bias": True}, r"attention_bias is True; read are: False"),
        ("qwen2, tied", {"model_type": "qwen4"}, r"'qwen4'; read are: 'llama', 'mistral', 'qwen2'"),
        (
            "qwen2, tied",
            {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}},
            r"rope_type of rope_parameters is 'longrope'; read are: 'default', 'llama3'",
        ),
    ],
)
def test_what_our_decoder_does_not_compute_is_refused(tmp_path, variant, changes, message):
    folder = folders.write_llama(tmp_path / "llm", variant)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(UserError, match=message):
        towers.open_llm(str(folder))


def test_biases_that_no_option_explains_are_refused(tmp_path):
    """A Qwen 2 whose config.json says that it is a Llama."""
    folder = folders.write_llama(tmp_path / "llm", "qwen2, untied")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    tower = towers.open_llm(str(folder))
    assert not tower.config.qkv_bias and isinstance(tower.config, LLMConfig)
    config = tiny_config()
    model = dataclasses.replace(config.model, llm=tower.config, image_token_id=96)
    wanted = abstract_of(dataclasses.replace(config, model=model), data=8, fsdp=1, tensor=1)
    with pytest.raises(UserError, match=r"holds what no parameter of ours is: 21 tensors"):
        load.check_tower(tower, wanted)


ODD = (0, -1, 2.5, "x", "", [], ["a"], [1], [[1]], {}, {"a": 1}, True, 1e999)
ODD_ROPES = ({"rope_type": ["yarn"], "factor": 2}, {"rope_type": 3}, {"type": {}, "factor": 1})


@pytest.mark.parametrize("name", ["qwen3, tied", "smollm3", "yarn", "siglip", "dinov2"])
def test_a_config_of_odd_values_is_read_or_refused(tmp_path, name):
    """Of every field, whatever it holds: one line for whoever wrote it, and no traceback."""
    write, read = {
        "siglip": (folders.write_siglip, families.open_vision),
        "dinov2": (folders.write_dinov2, families.open_vision),
    }.get(name, (lambda folder: folders.write_llama(folder, name), families.open_llm))
    write(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    groups = ("rope_scaling", "rope_parameters", "layer_types", "no_rope_layers", "mlp_ratio")
    refused = set()
    for field in {*fields, *groups, "architectures", "sliding_window", "quantization_config"}:
        for value in (*ODD, *ODD_ROPES):
            path.write_text(json.dumps(fields | {field: value}))
            try:
                read(tmp_path)
            except UserError as err:
                refused.add(field)
                assert str(tmp_path) in str(err)
    assert {"model_type", "architectures"} <= refused


def test_a_yarn_of_factor_1_keeps_its_factor_of_the_attention(tmp_path):
    folders.write_llama(tmp_path, "yarn")
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    rope = {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.25}
    path.write_text(json.dumps(fields | {"rope_scaling": rope}))
    config = families.open_llm(tmp_path).config
    assert config.rope_scaling.attention_factor == 1.25
    path.write_text(json.dumps(families.llm_of(config).hf_config(config)))
    assert families.open_llm(tmp_path).config == config
