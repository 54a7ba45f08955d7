"""Configuration: one clear line for every wrong field, stages, and the way to config.json and
back."""

import dataclasses
import json
import math
import pathlib
import runpy
from collections.abc import Iterator

import ml_collections
import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax import presets
from alignvlm_jax.commands import config_flag
from alignvlm_jax.config import checks, describing, renamed
from alignvlm_jax.errors import UserError

CONFIG_FILES = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


GIVEN = {
    "model": {
        "vision": dataclasses.asdict(presets.VISION["tiny"]),
        "llm": dataclasses.asdict(presets.LLM["tiny"]),
        "image_token_id": 4,
    },
    "data": {"dir": "data/mine", "seq_len": 192, "max_tiles": 2},
    "optim": {"learning_rate": 2e-3},
    "train": {"num_steps": 1000, "batch_size": 32},
}
"""What every config must give."""


def complete(changes: dict | None = None) -> dict:
    """`changes` laid over what must be given."""
    return laid_over(GIVEN, changes or {})


def laid_over(base: dict, changes: dict) -> dict:
    deeper = {
        name: laid_over(base[name], value)
        for name, value in changes.items()
        if isinstance(value, dict) and name in base
    }
    return base | changes | deeper


def complete_config_dict() -> ml_collections.ConfigDict:
    """The default config, with what must be given."""
    config_dict = config_lib.default_config_dict()
    config_dict.update(complete())
    return config_dict


def read(**fields) -> config_lib.Config:
    """The only stage of a complete config with `a__b=value` laid over it."""
    config_dict = complete_config_dict()
    for path, value in fields.items():
        config_dict.update_from_flattened_dict({path.replace("__", "."): value})
    [stage] = config_lib.from_config_dict(config_dict)
    return stage


def test_defaults():
    defaults = config_lib.Config()
    assert read() == config_lib.Config(
        model=dataclasses.replace(
            defaults.model, vision=presets.VISION["tiny"], llm=presets.LLM["tiny"], image_token_id=4
        ),
        data=config_lib.DataConfig(dir="data/mine", seq_len=192, max_tiles=2),
        optim=config_lib.OptimConfig(learning_rate=2e-3),
        train=config_lib.TrainConfig(num_steps=1000, batch_size=32),
    )


def given_paths(fields: dict, path: str = "") -> Iterator[str]:
    for name, value in fields.items():
        yield from (
            given_paths(value, f"{path}.{name}")
            if isinstance(value, dict)
            else [f"{path}.{name}"[1:]]
        )


MUST_BE_GIVEN = {
    path for path in given_paths(GIVEN) if describing.fields()[path].default is config_lib.MISSING
}


def test_what_must_be_given():
    """The sizes of towers, and what no default can be right for."""
    assert {
        path for path, field in describing.fields().items() if field.default is config_lib.MISSING
    } == MUST_BE_GIVEN
    others = {
        path for path in MUST_BE_GIVEN if not path.startswith(("model.vision.", "model.llm."))
    }
    assert others == {
        "model.image_token_id",
        "data.dir",
        "data.seq_len",
        "data.max_tiles",
        "optim.learning_rate",
        "train.num_steps",
        "train.batch_size",
    }


def test_all_that_is_missing_is_named_in_one_line():
    with pytest.raises(UserError) as error:
        config_lib.from_config_dict(config_lib.default_config_dict())
    message = str(error.value)
    assert "\n" not in message and message.startswith("stage 'train' lacks config.")
    assert (
        "config.model.llm.{vocab_size, width, mlp_width, num_layers, num_heads, num_kv_heads, "
        "head_dim} "
        '(usually set_preset(config.model.llm, presets.LLM["..."]))' in message
    )
    assert "config.optim.learning_rate, config.train.{num_steps, batch_size};" in message
    assert all(path.rpartition(".")[2] in message for path in MUST_BE_GIVEN)


@pytest.mark.parametrize("path", sorted(MUST_BE_GIVEN))
def test_each_field_that_must_be_given_is_missed(path):
    config_dict = complete_config_dict()
    config_dict.update_from_flattened_dict({path: None})
    with pytest.raises(
        UserError, match=rf"^stage 'train' lacks config\.{path}( \(usually .*\))?; such fields"
    ):
        config_lib.from_config_dict(config_dict)


def test_a_stage_may_give_what_all_lack():
    changes = complete()
    steps = changes.pop("train")
    first, second = config_lib.from_config_dict(
        {**changes, "stages": {"a": {"train": steps}, "b": {"train": steps}}}
    )
    assert first.train == second.train == config_lib.TrainConfig(**steps)
    with pytest.raises(
        UserError, match=r"^stage 'b' lacks config\.train\.\{num_steps, batch_size\};"
    ):
        config_lib.from_config_dict({**changes, "stages": {"a": {"train": steps}, "b": {}}})


def test_a_field_that_must_be_given_has_a_type_before_it_has_a_value():
    with pytest.raises(TypeError, match=r"num_steps.*int"):
        config_lib.default_config_dict().train.num_steps = "many"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, r"unknown config field config\.modle; did you mean 'model'\?"),
        (
            {"optim": {"learning_rte": 1.0}},
            r"unknown config field config\.optim\.learning_rte; did you mean 'learning_rate'\?",
        ),
        (
            {"model": {"llm": {"rope_scaling": {"faktor": 2.0}}}},
            r"unknown config field config\.model\.llm\.rope_scaling\.faktor; did you mean 'factor'\?",
        ),
        ({"mesh": {"qqq": 1}}, r"config\.mesh\.qqq; known: data, fsdp, tensor"),
        (
            {"stages": {"one": {"train": {"num_stepz": 1}}}},
            r"config\.train\.num_stepz; did you mean 'num_steps'\?",
        ),
    ],
)
def test_unknown_field_names_the_nearest(changes, message):
    with pytest.raises(UserError, match=message):
        config_lib.from_config_dict(complete(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "0"}, r"config\.seed is '0' of type str; it must be .*int"),
        ({"seed": 1.5}, r"config\.seed is 1\.5 of type float; it must be .*int"),
        ({"seed": True}, r"config\.seed is True of type bool; it must be .*int"),
        ({"seed": None}, r"config\.seed is None"),
        (
            {"data": {"use_overview": 1}},
            r"config\.data\.use_overview is 1 of type int; it must be .*bool",
        ),
        ({"optim": {"b1": "0.9"}}, r"config\.optim\.b1 is '0\.9' of type str; it must be .*float"),
        ({"optim": {"b1": True}}, r"config\.optim\.b1 is True of type bool"),
        ({"optim": 3}, r"config\.optim is 3; it must be a group of fields"),
        ({"name": 3}, r"config\.name is 3 of type int; it must be .*str"),
        ({"train": {"trainable": 3}}, r"config\.train\.trainable is 3 of type int"),
        (
            {"train": {"load": ("llm/.*", 3)}},
            r"config\.train\.load\[1\] is 3 of type int; it must be .*str",
        ),
        ({"data": {"tasks": "answer"}}, r"config\.data\.tasks is 'answer' of type str"),
        (
            {"data": {"tasks": {"answer": "all"}}},
            r"config\.data\.tasks\.answer is 'all' of type str; .*float",
        ),
        ({"stages": {"one": 5}}, r"config\.stages\.one is 5; it must be a group of fields"),
    ],
)
def test_wrong_type_names_field_and_value(changes, message):
    with pytest.raises(UserError, match=message):
        config_lib.from_config_dict(complete(changes))


def test_numbers_and_lists_are_taken_as_meant():
    """A whole number for a float, a list (all that JSON and the command line have) for a tuple."""
    [stage] = config_lib.from_config_dict(
        complete(
            {
                "optim": {"learning_rate": 1},
                "train": {"trainable": ["llm/.*"]},
                "data": {"tasks": {"answer": 1}},
            }
        )
    )
    assert stage.optim.learning_rate == 1.0 and isinstance(stage.optim.learning_rate, float)
    assert stage.train.trainable == ("llm/.*",)
    assert stage.data.tasks == {"answer": 1.0} and isinstance(stage.data.tasks["answer"], float)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.dtype", "float31", r"config\.model\.dtype is 'float31'; did you mean 'float32'\?"),
        (
            "model.attention",
            "splsh",
            r"config\.model\.attention is 'splsh'; did you mean 'splash'\?",
        ),
        ("train.grad_reduce_dtype", "float23", r"reduce_dtype is 'float23'; .* 'float32'\?"),
        (
            "train",
            {"jit": False, "offload_optimizer": True},
            r"offload_optimizer needs config\.train\.jit",
        ),
        ("model.remat", "ful", r"config\.model\.remat is 'ful'; did you mean 'full'\?"),
        ("model.remat", "atention+qkv", r"remat is 'atention\+qkv'; .* 'attention\+qkv'\?"),
        ("model.remat", "mlp+qvk", r"remat is 'mlp\+qvk'; did you mean 'mlp\+qkv'\?"),
        (
            "model.connector.w2_init",
            "lmhead",
            r"config\.model\.connector\.w2_init is 'lmhead'; did you mean 'lm_head'",
        ),
        (
            "model.connector.embed_grad",
            "stopped",
            r"config\.model\.connector\.embed_grad .*did you mean 'stop'",
        ),
        (
            "model.connector",
            {"name": "ovis", "visual_vocab_size": 0},
            r"\.visual_vocab_size is 0; .* at least 1",
        ),
        (
            "model.connector",
            {"name": "h_reducer", "merged_columns": 0},
            r"\.merged_columns is 0; .* at least 1",
        ),
        (
            "model.connector.name",
            "algin",
            r"config\.model\.connector\.name is 'algin'; did you mean 'align'\?",
        ),
        ("model.connector.name", 3, r"config\.model\.connector\.name is 3; known: align, "),
        (
            "model.connector.use_ln",
            True,
            r"config\.model\.connector\.use_ln; did you mean 'use_ln2'\?",
        ),
        (
            "model.connector.use_ln2",
            1,
            r"config\.model\.connector\.use_ln2 is 1 of type int; it must be bool",
        ),
        (
            "model.connector.w2_init",
            1,
            r"config\.model\.connector\.w2_init is 1 of type int; it must be str",
        ),
        ("model.connector", 3, r"config\.model\.connector is 3; it must be a group of fields"),
        ("model.connectors", 3, r"config\.model\.connectors is 3; it must be a group of fields"),
        (
            "model.connectors.ovis",
            3,
            r"config\.model\.connectors\.ovis is 3; it must be a group of fields",
        ),
        (
            "model.connectors.ovid",
            {},
            r"config\.model\.connector\.name is 'ovid'; did you mean 'ovis'\?",
        ),
        (
            "model.connectors.ovis.size",
            3,
            r"config\.model\.connectors\.ovis\.size; .*visual_vocab_size",
        ),
        (
            "model.connectors.ovis.visual_vocab_size",
            "3",
            r"connectors\.ovis\.visual_vocab_size is '3' of type str",
        ),
        (
            "train.visual_source",
            "pixel",
            r"config\.train\.visual_source is 'pixel'; did you mean 'pixels'\?",
        ),
        (
            "model.vision.tile_height",
            30,
            r"model\.vision\.tile_height 30 is not a multiple of patch_height 16; .*15$",
        ),
        (
            "model.vision.tile_width",
            100,
            r"model\.vision\.tile_width 100 is not a multiple of patch_width 8; .* 10$",
        ),
        (
            "model.vision.num_heads",
            3,
            r"model\.vision\.width 128 is not a multiple of num_heads 3; .*: (2|4)$",
        ),
        (
            "model.llm.num_kv_heads",
            3,
            r"model\.llm\.num_heads 4 is not a multiple of num_kv_heads 3; .*: (2|4)$",
        ),
        (
            "train.grad_accum_steps",
            5,
            r"train\.batch_size 32 is not a multiple of grad_accum_steps 5; .*: 4$",
        ),
        (
            "train.grad_accum_steps",
            0,
            r"train\.batch_size 32 is not a multiple of grad_accum_steps 0; .*: 1$",
        ),
        ("train.batch_size", 0, r"config\.train\.batch_size is 0; it must be at least 1"),
        ("train.num_steps", 0, r"config\.train\.num_steps is 0; it must be at least 1"),
        ("train.log_every", 0, r"config\.train\.log_every is 0; it must be at least 1"),
        (
            "train.checkpoint_every",
            -1,
            r"config\.train\.checkpoint_every is -1; it must be at least 1",
        ),
        ("train.validate_every", 0, r"config\.train\.validate_every is 0; it must be at least 1"),
        (
            "train.keep_checkpoints",
            0,
            r"config\.train\.keep_checkpoints is 0; it must be at least 1",
        ),
        ("data.max_tiles", 0, r"config\.data\.max_tiles is 0; it must be at least 1"),
        ("data.max_patch_labels", 0, r"config\.data\.max_patch_labels is 0; it must be at least 1"),
        ("eval.num_questions", 0, r"config\.eval\.num_questions is 0; it must be at least 1"),
        ("eval.batch_size", 0, r"config\.eval\.batch_size is 0; it must be at least 1"),
        ("eval.max_new_tokens", 0, r"config\.eval\.max_new_tokens is 0; it must be at least 1"),
        (
            "model.vision.num_layers",
            0,
            r"config\.model\.vision\.num_layers is 0; it must be at least 1",
        ),
        ("model.llm.num_layers", 0, r"config\.model\.llm\.num_layers is 0; it must be at least 1"),
        ("model.llm.vocab_size", 0, r"config\.model\.llm\.vocab_size is 0; it must be at least 1"),
        ("model.vision.width", -4, r"config\.model\.vision\.width is -4; it must be at least 1"),
        ("model.scan_unroll", 0, r"config\.model\.scan_unroll is 0; it must be at least 1"),
        (
            "model.vision.pixel_std",
            (0.5, 0.0, 0.5),
            r"pixel_std is \(0\.5, 0\.0, 0\.5\); .* above 0",
        ),
        ("model.vision.pixel_mean", (0.5,), r"pixel_mean is \(0\.5,\); it must be three numbers"),
        ("model.vision.gelu", "exakt", r"gelu is 'exakt'; did you mean 'exact'\?"),
        (
            "model.llm.rope_scaling.low_freq_factor",
            4.0,
            r"low_freq_factor 4\.0 must be below high_freq_factor 4\.0",
        ),
        (
            "model.llm.head_dim",
            5,
            r"config\.model\.llm\.head_dim is 5; rotary embedding needs an even number",
        ),
        (
            "data.seq_len",
            64,
            r"config\.data\.seq_len 64 leaves no room for text: 2 tiles are 64 image tokens",
        ),
        (
            "data.max_tiles",
            7,
            r"config\.data\.seq_len 192 leaves no room for text: 7 tiles are 224 image tokens",
        ),
        ("seed", -1, r"config\.seed is -1; it must be at least 0"),
        ("optim.learning_rate", 0.0, r"config\.optim\.learning_rate is 0\.0; it must be above 0"),
        (
            "optim.learning_rate",
            math.nan,
            r"config\.optim\.learning_rate is nan; it must be a finite number",
        ),
        (
            "optim.learning_rate",
            math.inf,
            r"config\.optim\.learning_rate is inf; it must be a finite number",
        ),
        (
            "optim.weight_decay",
            -0.1,
            r"config\.optim\.weight_decay is -0\.1; it must be at least 0",
        ),
        ("optim.b1", 1.0, r"config\.optim\.b1 is 1\.0; it must be below 1"),
        ("optim.b2", -0.1, r"config\.optim\.b2 is -0\.1; it must be at least 0"),
        ("optim.clip_norm", 0.0, r"config\.optim\.clip_norm is 0\.0; it must be above 0"),
        (
            "model.llm.rope_scaling.factor",
            0.0,
            r"config\.model\.llm\.rope_scaling\.factor is 0\.0; it must be above 0",
        ),
        ("data.num_threads", 0, r"config\.data\.num_threads is 0; it must be at least 1"),
        ("data.prefetch", 0, r"config\.data\.prefetch is 0; it must be at least 1"),
        ("data.blank_weight", -1.0, r"config\.data\.blank_weight is -1\.0; it must be at least 0"),
        (
            "train.validation_sequences",
            0,
            r"config\.train\.validation_sequences is 0; it must be at least 1",
        ),
        (
            "train.patch_token_weight",
            -1.0,
            r"config\.train\.patch_token_weight is -1\.0; it must be at least 0",
        ),
        ("train.z_loss", -1.0, r"config\.train\.z_loss is -1\.0; it must be at least 0"),
        (
            "model.vocab_impl",
            "chunk",
            r"config\.model\.vocab_impl is 'chunk'; did you mean 'chunked'\?",
        ),
        (
            "model.chunk_size_mib",
            0.0,
            r"config\.model\.chunk_size_mib is 0\.0; it must be above 0",
        ),
        ("model.llm.padded_rows", 128, r"padded_rows 128 leaves no word of vocab_size 128"),
        (
            "optim.learning_rate_scale",
            {"visoin": 0.1},
            r"learning_rate_scale\.visoin is no component .*did you mean 'vision'",
        ),
        (
            "optim.learning_rate_scale",
            {"llm": -1.0},
            r"learning_rate_scale\.llm is -1\.0; it must be at least 0",
        ),
        (
            "optim.name",
            "adafator",
            r"config\.optim\.name is 'adafator'; did you mean 'adafactor'\?",
        ),
        (
            "optim.moment_dtype",
            "bfloat",
            r"config\.optim\.moment_dtype is 'bfloat'; did you mean 'bfloat16'\?",
        ),
        ("optim.learning_rate_scale", {"lora": 2.0}, r"scale\.lora changes nothing: .*rank is 0"),
        ("lora.rank", -1, r"config\.lora\.rank is -1; it must be at least 0"),
        ("lora.alpha", 0.0, r"config\.lora\.alpha is 0\.0; it must be above 0"),
        ("eval.splits", (), r"config\.eval\.splits is empty; name at least one split"),
        (
            "data.tasks",
            {"answer": math.nan},
            r"config\.data\.tasks\.answer is nan; it must be a finite number",
        ),
        ("data.tasks", {}, r"config\.data\.tasks \{\} has no positive weight"),
        (
            "data.tasks",
            {"answer": 0.0},
            r"config\.data\.tasks \{'answer': 0\.0\} has no positive weight",
        ),
        ("data.packing", "ofline", r"config\.data\.packing is 'ofline'; did you mean 'offline'\?"),
        (
            "data.loss_normalisation",
            "tokens",
            r"config\.data\.loss_normalisation is 'tokens'; did you mean 'token'\?",
        ),
        ("data.temperature", 0.0, r"config\.data\.temperature is 0\.0; it must be above 0"),
        (
            "data.record_tiles",
            3,
            r"config\.data\.record_tiles is 3; a packed sequence has config\.data\.max_tiles 2 of them",
        ),
        ("data.record_tiles", -1, r"config\.data\.record_tiles is -1; it must be at least 0"),
        ("data.sources", {"a": {}}, r"config\.data\.sources\.a\.dir is empty"),
        (
            "data.sources",
            {"a": {"dir": "d", "wait": 1.0}},
            r"config\.data\.sources\.a\.wait; did you mean 'weight'\?",
        ),
        (
            "data.sources",
            {"a": {"dir": "d", "weight": -1.0}},
            r"sources\.a\.weight is -1\.0; it must be at least 0",
        ),
        (
            "data.sources",
            {"a": {"dir": "d", "weight": 0}},
            r"config\.data\.sources a: .* a weight above 0",
        ),
        (
            "data.sources",
            {"a": {"dir": "d", "repeat": 0.0}},
            r"sources\.a\.repeat is 0\.0; it must be above 0",
        ),
        (
            "data.sources",
            {"a": {"dir": "d", "cap": -1}},
            r"sources\.a\.cap is -1; it must be at least 0",
        ),
        (
            "data.sources",
            {"a/b": {"dir": "d"}},
            r"sources\.a/b: a source's name is made of letters",
        ),
        (
            "data.sources",
            {"a": "d"},
            r"config\.data\.sources\.a is 'd'; it must be a group of fields",
        ),
        (
            "data.tasks",
            {"answer": 1.0, "transcribe": -0.5},
            r"config\.data\.tasks .*-0\.5.* has no positive weight",
        ),
    ],
)
def test_impossible_fields(path, value, message):
    changes = value
    for name in reversed(path.split(".")):
        changes = {name: changes}
    with pytest.raises(UserError, match=message) as error:
        config_lib.from_config_dict(complete(changes))
    assert "\n" not in str(error.value)


def test_smallest_row_that_leaves_room():
    assert read(data__seq_len=65).data.seq_len == 65


def test_patches_of_a_tile():
    vision = config_lib.VisionConfig(tile_height=32, tile_width=128, patch_height=16, patch_width=8)
    assert vision.patch_grid == (2, 16) and vision.num_patches == 32
    assert config_lib.ModelConfig(vision=vision).tokens_per_tile == 32


# Comments.


def test_every_field_has_a_comment():
    assert [field.path for field in describing.fields().values() if not field.comment] == []


@pytest.mark.parametrize("path", checks.CHOICES)
def test_the_comment_names_every_choice(path):
    """Of a choice that joins others by "+", these."""
    comment = describing.fields()[path].comment
    names = {name for choice in checks.CHOICES[path] for name in choice.split("+")}
    assert [name for name in names if f'"{name}"' not in comment] == []


def test_comments_are_those_of_the_source():
    """On the field's line, or on the lines above it."""
    fields = describing.fields()
    assert fields["seed"].comment.startswith("Seed of the initialisation, the order")
    assert fields["data.sources.NAME.cap"].comment == (
        "Records that an epoch takes of it at most; no other source gets the rest. 0: no bound."
    )
    assert fields["train.z_loss"].comment == (
        "Factor of the squared log-sum-exp of the logits, which keeps them from drifting (PaLM, "
        "arXiv 2204.02311)."
    )
    assert (
        fields["data.record_tiles"].comment == "Tiles of a record at most; 0: as many as max_tiles."
    )


def test_leaves_are_all_fields_and_those_of_each_source():
    sources = {"a": {"dir": "x"}, "b": {"dir": "y", "cap": 3}}
    plain = describing.leaves(read())
    mixed = describing.leaves(read(data__sources=sources))
    fields = describing.fields()
    own = {
        path for path in fields if not path.startswith("model.connectors.") and ".NAME." not in path
    }
    of_align = {path for path in fields if path.startswith("model.connectors.align.")}
    assert len(of_align) == 6
    assert plain.keys() == own | {
        path.replace("connectors.align", "connector") for path in of_align
    }
    assert plain["model.connector.use_ln2"][1] == fields["model.connectors.align.use_ln2"]
    assert mixed["data.sources.b.cap"][0] == 3 and mixed["data.sources.a.cap"][0] == 0
    assert mixed["data.sources.b.cap"][1] == describing.fields()["data.sources.NAME.cap"]


# Connectors.


def connector(name: str, **options) -> config_lib.Config:
    """Of the default tile of 2 x 16 patches."""
    return read(
        **{
            f"model__connector__{field}": value
            for field, value in {"name": name, **options}.items()
        }
    )


@pytest.mark.parametrize(
    ("name", "options", "slots"),
    [
        ("align", {}, 32),
        ("mlp", {}, 32),
        ("ovis", {}, 32),
        ("perceiver", {"num_latents": 7}, 7),
        ("h_reducer", {}, 8),
        ("h_reducer", {"merged_columns": 8}, 4),
        ("c_abstractor", {"pooled_rows": 1, "pooled_columns": 5}, 5),
    ],
)
def test_slots_follow_from_the_connector(name, options, slots):
    config = connector(name, **options)
    assert config.model.tokens_per_tile == config.tokens_per_tile == slots
    # From labels comes one token for each patch, whatever the connector would make of them.
    train = dataclasses.replace(config.train, visual_source="oracle")
    assert dataclasses.replace(config, train=train).tokens_per_tile == 32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("h_reducer", {"merged_columns": 5}, r"tile_width 128 has 16 columns of patches, no multiple of \S+ 5; "
         r"nearest that fit: tile_width 120, or merged_columns 4$"),
        ("c_abstractor", {}, r"pooled_rows is 12 and a tile has 2 rows of patches; at most 2$"),
        ("c_abstractor", {"pooled_rows": 2, "pooled_columns": 17}, r"pooled_columns is 17 and a tile has 16 columns"),
        ("perceiver", {"num_latents": 96}, r"seq_len 192 leaves no room for text: 2 tiles are 192 image tokens"),
    ],
)  # fmt: skip
def test_a_connector_that_does_not_fit_the_tile(name, options, message):
    with pytest.raises(UserError, match=message):
        connector(name, **options)


def test_options_of_other_connectors_are_kept_for_them_and_not_looked_at():
    """As a sweep has them that changes the name alone; also where they stand as older versions
    wrote them."""
    config = connector("mlp", merged_columns=5, pooled_rows=99, num_blocks=3)
    assert config.model.tokens_per_tile == 32
    assert config.model.connector == config_lib.connector("mlp")
    assert config.model.connectors == {
        "h_reducer": {"merged_columns": 5},
        "c_abstractor": {"pooled_rows": 99},
    }
    assert config == connector("mlp") and hash(config.model) == hash(connector("mlp").model)
    assert config.model.with_connector("h_reducer").connector == config_lib.connector(
        "h_reducer", merged_columns=5
    )
    assert config.model.with_connector("mlp") is config.model


def test_an_option_of_the_connector_chosen_goes_before_the_same_by_name():
    by_name = {
        "model__connectors__perceiver__num_latents": 7,
        "model__connectors__perceiver__num_layers": 2,
    }
    assert read(
        **by_name, model__connector__name="perceiver"
    ).model.connector == config_lib.connector("perceiver", num_latents=7, num_layers=2)
    both = read(**by_name, model__connector__name="perceiver", model__connector__num_latents=5)
    assert both.model.connector == config_lib.connector("perceiver", num_latents=5, num_layers=2)
    assert read(**by_name).model.connector == config_lib.connector("align")


def test_another_connector_can_be_chosen_for_a_model_of_a_file():
    stage = read(
        model__connector__name="perceiver",
        model__connector__num_latents=7,
        model__connector__num_layers=2,
    )
    [fields] = config_lib.to_json((stage,))
    config_dict = config_lib.default_config_dict()
    for group in ("data", "optim", "train", "eval"):
        config_dict[group].update(fields[group])
    config_lib.set_model(config_dict.model, fields["model"])
    assert config_lib.from_config_dict(config_dict)[0].model == stage.model
    config_dict.model.connector.name = "ovis"
    assert config_lib.from_config_dict(config_dict)[0].model.connector == config_lib.connector(
        "ovis"
    )


def test_options_made_for_another_name_are_a_fault_of_the_program():
    model = dataclasses.replace(read().model, connector=config_lib.ConnectorConfig(name="ovis"))
    with pytest.raises(TypeError, match="not the options of"):
        config_lib.check(dataclasses.replace(read(), model=model))


# Stages.


def test_stages_are_differences_from_the_base():
    config_dict = complete_config_dict()
    config_dict.seed = 7
    config_dict.optim.learning_rate = 1e-3
    config_dict.stages = ml_collections.ConfigDict(
        {
            "align": {"train": {"num_steps": 5}},
            "finetune": {"optim": {"weight_decay": 0.5}, "seed": 8},
        }
    )
    align, finetune = config_lib.from_config_dict(config_dict)
    assert (align.stage, finetune.stage) == ("align", "finetune")
    assert (align.seed, finetune.seed) == (7, 8)
    assert align.train == config_lib.TrainConfig(num_steps=5, batch_size=32)
    assert finetune.train == config_lib.TrainConfig(num_steps=1000, batch_size=32)
    assert align.optim == config_lib.OptimConfig(learning_rate=1e-3)
    assert finetune.optim == config_lib.OptimConfig(learning_rate=1e-3, weight_decay=0.5)


def test_stages_run_in_the_order_of_their_names():
    """A ConfigDict sorts its keys; a plain mapping must not mean something else."""
    stages = config_lib.from_config_dict(complete({"stages": {"b": {}, "a": {}}}))
    assert [stage.stage for stage in stages] == ["a", "b"]


def test_a_task_mixture_is_replaced_whole():
    base = {
        "data": {"tasks": {"transcribe": 1.0}, "dir": "d"},
        "stages": {"a": {"data": {"tasks": {"answer": 2.0}}}},
    }
    [stage] = config_lib.from_config_dict(complete(base))
    assert stage.data.tasks == {"answer": 2.0} and stage.data.dir == "d"


def test_sources_of_a_stage_replace_those_of_the_base():
    base = {"data": {"sources": {"a": {"dir": "x", "weight": 2}, "c": {"dir": "z"}}}}
    first, second = config_lib.from_config_dict(
        complete(base | {"stages": {"1": {}, "2": {"data": {"sources": {"b": {"dir": "y"}}}}}})
    )
    assert first.data.sources["a"] == config_lib.SourceConfig(dir="x", weight=2.0)
    assert first.data.folders == ("x", "z") and second.data.folders == ("y",)
    assert config_lib.DataConfig(dir="d").folders == ("d",)


def test_every_stage_is_checked():
    with pytest.raises(UserError, match=r"config\.train\.num_steps is 0"):
        config_lib.from_config_dict(
            complete({"stages": {"a": {}, "b": {"train": {"num_steps": 0}}}})
        )


def test_reading_leaves_the_config_dict_as_it_is():
    config_dict = complete_config_dict()
    config_dict.stages = ml_collections.ConfigDict({"a": {"seed": 3}})
    before = config_dict.to_json()
    config_lib.from_config_dict(config_dict)
    assert config_dict.to_json() == before


def test_references_follow_an_override():
    config_dict = complete_config_dict()
    config_dict.train.log_every = config_dict.train.get_ref("num_steps")
    config_dict.train.num_steps = 17
    [stage] = config_lib.from_config_dict(config_dict)
    assert stage.train.log_every == 17


# Files.


def test_json_round_trip():
    stages = config_lib.from_config_dict(
        complete(
            {
                "model": {"llm": {"rope_scaling": {"factor": 8.0}}},
                "mesh": {"tensor": 2},
                "data": {"sources": {"pages": {"dir": "data/pages", "repeat": 1.5, "cap": 9}}},
                "stages": {
                    "a": {"train": {"trainable": ("llm/.*", "connector/.*")}},
                    "b": {"data": {"tasks": {"x": 1.0}}},
                },
            }
        )
    )
    text = json.dumps(config_lib.to_json(stages))
    assert config_lib.from_json(json.loads(text)) == stages


OLD_CONNECTOR = {
    "name": "perceiver",
    "use_ln2": True,
    "ln2_gain_init": 1.0,
    "w2_init": "lm_head",
    "embed_grad": "live",
    "weights": "linear",
    "num_latents": 16,
    "num_layers": 3,
    "visual_vocab_size": 128,
    "merged_columns": 4,
    "pooled_rows": 12,
    "pooled_columns": 12,
    "num_blocks": 3,
}
"""As files have it that were written before connectors had options of their own."""


def test_json_with_the_options_of_all_connectors_in_one():
    [fields] = config_lib.to_json((read(),))
    fields["model"]["connector"] = OLD_CONNECTOR
    del fields["model"]["connectors"]
    [config] = config_lib.from_json([fields])
    assert config.model.connector == config_lib.connector("perceiver", num_latents=16, num_layers=3)
    assert config.model.connectors == {
        "align": {"weights": "linear"},
        "ovis": {"visual_vocab_size": 128},
    }
    [current] = config_lib.current_form([fields])
    assert [current] == config_lib.to_json((config,))
    assert config_lib.current_form([current]) == [current]
    fields["model"]["connector"] = OLD_CONNECTOR | {"num_latent": 3}
    with pytest.raises(UserError, match=r"connector\.num_latent; did you mean 'num_latents'"):
        config_lib.from_json([fields])


def test_json_with_options_of_a_connector_that_is_not_registered_here():
    [fields] = config_lib.to_json((read(),))
    fields["model"]["connectors"] = {"seventh": {"width": 3}, "ovis": {"visual_vocab_size": 128}}
    [config] = config_lib.from_json([fields])
    assert config.model.connectors == {"ovis": {"visual_vocab_size": 128}}


def test_a_config_json_from_before_fields_had_to_be_given_is_read():
    """The demonstration's second stage as it was written when every field had a default."""
    [old] = json.loads((pathlib.Path(__file__).parent / "golden" / "config.json").read_text())
    [stage] = config_lib.from_json([old])
    assert stage.model.llm == presets.LLM["tiny"] and stage.train.num_steps == 1400
    [new] = json.loads(json.dumps(config_lib.to_json((stage,))))
    for fields in (old, new):
        del fields["model"]["connector"]
    del new["model"]["connectors"]
    old = renamed.stage(old)
    # Came later; the defaults of the others are held by the file.
    del new["train"]["jit"], new["run_id"], new["data"]["images_first"], new["lora"]
    del new["train"]["num_records"], new["train"]["answer_weight"]
    del new["train"]["sampled_entries"], new["data"]["label_unit"]
    del new["data"]["label_slope"], new["data"]["tiling"], new["data"]["blank_contrast"]
    del new["data"]["records_per_sequence"], new["data"]["text_unit"]
    del new["train"]["bfloat16_params"], new["optim"]["name"], new["optim"]["moment_dtype"]
    del new["model"]["llm"]["context_length"]
    del new["train"]["grad_reduce_dtype"], new["train"]["offload_optimizer"]
    options = ("qkv_bias", "qk_norm", "no_rope_every")
    assert [new["model"]["llm"].pop(name) for name in options] == [False, False, 0]
    scaling = new["model"]["llm"]["rope_scaling"]
    assert [scaling.pop(name) for name in ("type", "attention_factor")] == ["llama3", 1.0]
    # Patch labels stay what they were when the run began.
    later = {path.partition(".")[2]: value for path, value in renamed.BEFORE.items()}
    assert old["data"].items() >= later.items() and config_lib.DataConfig().full_cover == 1
    assert new == old


def old_names(fields: dict) -> dict:
    """The fields of a stage with every name and value that was ever called otherwise."""
    old = json.loads(json.dumps(fields))
    for before, now in renamed.FIELDS.items():
        group, name = now.split(".")
        value = old[group].pop(name)
        values = {new: was for was, new in renamed.VALUES.get(now, {}).items()}
        old[group][before.split(".")[1]] = values.get(value, value)
    packing = {"offline": "plan"}
    old["data"]["packing"] = packing.get(old["data"]["packing"], old["data"]["packing"])
    return old


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (
            {"train__patch_token_weight": 0.0},
            "is 0, and so is patch_token_weight: .*answer_weight=1 adds",
        ),
        ({"train__visual_source": "oracle"}, "is 0, and visual_source 'oracle' has no patch loss"),
        ({"model__connector__name": "mlp"}, "is 0, and 'mlp' has no patch loss"),
        ({"train__sampled_entries": 129}, "sampled_entries is 129; the vocabulary has 128$"),
        (
            {"train__sampled_entries": 64, "train__answer_weight": 1.0},
            "sampled_entries is 64, of use with answer_weight 0 alone",
        ),
    ],
)
def test_losses_that_do_not_go_together(fields, why):
    alone = read(train__answer_weight=0.0, train__sampled_entries=128).train
    assert (alone.answer_weight, alone.sampled_entries) == (0, 128)
    with pytest.raises(UserError, match=f"config.train.*{why}"):
        read(**{"train__answer_weight": 0.0} | fields)


def test_stored_configs_are_read_under_their_old_names():
    config = read(
        data__packing="offline",
        data__seq_len=999,
        model__vocab_impl="chunked",
        train__visual_source="oracle",
        train__grad_accum_steps=2,
    )
    [fields] = config_lib.to_json((config,))
    old = old_names(fields)
    assert {"row_length", "loss_by"} <= old["data"].keys() and old["data"]["packing"] == "plan"
    assert old["train"]["visual_input"] == "labels" and old["model"]["vocab_form"] == "blockwise"
    assert config_lib.from_json([old]) == (config,)
    [plain] = json.loads(json.dumps([fields]))
    assert config_lib.current_form([old]) == config_lib.current_form([plain])


def test_fields_that_an_earlier_version_did_not_have_get_their_defaults():
    [fields] = json.loads(json.dumps(config_lib.to_json((read(),))))
    old = json.loads(json.dumps(fields))
    del old["train"]["jit"], old["data"]["use_overview"], old["model"]["vision"]["norm_eps"]
    del old["lora"]
    assert config_lib.current_form([old]) == config_lib.current_form([fields])
    del old["data"]["dir"]
    assert "dir" not in config_lib.current_form([old])[0]["data"]


def test_stored_stages_of_before_are_known_by_their_names():
    [fields] = json.loads(json.dumps(config_lib.to_json((read(),))))
    assert not renamed.is_from_before([fields])
    assert renamed.is_from_before([fields, old_names(fields)])


def test_every_new_name_is_a_field_and_no_old_one_is():
    [fields] = config_lib.to_json((read(),))
    for old, new in renamed.FIELDS.items():
        (group, before), (same, now) = old.split("."), new.split(".")
        assert group == same and now in fields[group] and before not in fields[group]
    for path in renamed.VALUES:
        assert set(renamed.VALUES[path].values()) <= set(checks.CHOICES[path])
        assert not set(renamed.VALUES[path]) & set(checks.CHOICES[path])


@pytest.mark.parametrize(("old", "new"), renamed.FIELDS.items())
def test_an_old_name_in_a_config_file_is_refused_with_the_new_one(old, new):
    with pytest.raises(UserError, match=rf"config\.{old}: it is called config\.{new} now$"):
        read(**{old.replace(".", "__"): 1})


def test_an_old_value_is_refused_with_the_new_one():
    with pytest.raises(UserError, match=r"packing is 'plan': it is called 'offline' now$"):
        read(data__packing="plan")


def test_a_folder_from_before_is_fine_tuned(tmp_path):
    golden = pathlib.Path(__file__).parent / "golden" / "config.json"
    (tmp_path / "config.json").write_text(golden.read_text())
    stages, _ = config_flag.parse([f"--config=configs/finetune.py:{tmp_path}"])
    assert {stage.model.llm for stage in stages} == {presets.LLM["tiny"]}


def test_a_config_json_that_lacks_a_field_says_so():
    [fields] = config_lib.to_json((read(),))
    del fields["data"]["dir"]
    fields["train"]["num_steps"] = None
    with pytest.raises(UserError, match=r"lacks config\.data\.dir, config\.train\.num_steps;"):
        config_lib.from_json([fields])


def test_json_of_another_version_names_the_field():
    [fields] = config_lib.to_json((read(),))
    fields["train"]["gone"] = 1
    with pytest.raises(UserError, match=r"unknown config field config\.train\.gone"):
        config_lib.from_json([fields])


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_presets(part):
    for preset in {"vision": presets.VISION, "llm": presets.LLM}[part].values():
        config_dict = complete_config_dict()
        config_dict.data.seq_len = 2**20  # room for tiles of any size
        config_lib.set_preset(config_dict.model[part], preset)
        [stage] = config_lib.from_config_dict(config_dict)
        assert getattr(stage.model, part) == preset


def test_moments_in_bfloat16_are_of_adamw_and_of_a_decay_that_they_can_hold():
    assert read(optim__moment_dtype="bfloat16").optim.b2 <= 0.99
    with pytest.raises(UserError, match=r"moment_dtype 'bfloat16' is of adamw's running means"):
        read(optim__moment_dtype="bfloat16", optim__name="adafactor")
    with pytest.raises(
        UserError, match=r"b2 is 0\.999; with moment_dtype 'bfloat16' .* most 0\.99"
    ):
        read(optim__moment_dtype="bfloat16", optim__b2=0.999)


def test_text_lines_have_no_overview_and_no_plan():
    assert read(data__tiling="lines").data.tiling == "lines"
    with pytest.raises(UserError, match=r"^config\.data\.tiling 'lines' has no overview; leave"):
        read(data__tiling="lines", data__use_overview=True)
    with pytest.raises(UserError, match=r"^config\.data\.tiling 'lines' cannot .* must be 'none'$"):
        read(data__tiling="lines", data__packing="offline")
    with pytest.raises(UserError, match=r"^config\.data\.blank_contrast 9 cannot be planned; pack"):
        read(data__blank_contrast=9, data__packing="offline")
    with pytest.raises(UserError, match=r"^config\.data\.text_unit 'letter' cannot be planned; p"):
        read(data__text_unit="letter", data__packing="offline")
    with pytest.raises(UserError, match=r"is 9, and connector 'h_reducer' makes \d+ visual tokens"):
        read(data__blank_contrast=9, model__connector__name="h_reducer")
    # As many tokens as patches are not yet tokens of patches.
    latents = config_lib.connector("perceiver", num_latents=read().model.vision.num_patches)
    perceiver = dataclasses.replace(read().model, connector=latents)
    data = dataclasses.replace(read().data, blank_contrast=9)
    with pytest.raises(UserError, match=r"is 9, and connector 'perceiver' makes (\d+) .* \1 patch"):
        config_lib.check(dataclasses.replace(read(), model=perceiver, data=data))
    # Of every row of patches one stays.
    with pytest.raises(UserError, match=r"room for text: 2 blank tiles are \d+ image tokens"):
        read(data__blank_contrast=9, data__max_tiles=2, data__seq_len=2)
    with pytest.raises(
        UserError, match=r"sequence 2 is of one folder .* config\.data\.packing 'off"
    ):
        read(data__records_per_sequence=2, data__packing="offline")
    with pytest.raises(UserError, match=r"blank_contrast is 256; it must be at most 255$"):
        read(data__blank_contrast=256)
    with pytest.raises(UserError, match=r"tiling is 'line'; did you mean 'lines'\?"):
        read(data__tiling="line")


def test_lora_is_a_group_whose_targets_are_one_pattern_or_several():
    config_dict = complete_config_dict()
    config_dict.lora = {"rank": 16, "alpha": 32, "targets": "llm/.*/attn/(q|v)/kernel"}
    [stage] = config_lib.from_config_dict(config_dict)
    assert stage.lora == config_lib.LoraConfig(rank=16, targets=("llm/.*/attn/(q|v)/kernel",))
    config_dict.lora = {"rank": 16, "targets": ("a", "b")}
    assert config_lib.from_config_dict(config_dict)[0].lora.targets == ("a", "b")
    config_dict.lora = {"rank": 16, "targets": ()}
    with pytest.raises(UserError, match=r"rank is 16 and config\.lora\.targets is empty"):
        config_lib.from_config_dict(config_dict)
    config_dict.lora = {"rang": 16}
    with pytest.raises(UserError, match=r"config\.lora\.rang; did you mean 'rank'"):
        config_lib.from_config_dict(config_dict)


NEED_WEIGHTS = (
    "finetune", "lora", "smollm2", "documents", "documents_lora", "trial", "reader",
)  # fmt: skip
"""Tested with a converted model, in tests/commands/test_convert.py and tests/configs."""


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIG_FILES if path.stem not in (*NEED_WEIGHTS, "paper")],
    ids=lambda path: path.stem,
)
def test_config_files_load(path):
    stages = config_lib.from_config_dict(runpy.run_path(str(path))["get_config"]())
    assert len({stage.stage for stage in stages}) == len(stages) >= 1
