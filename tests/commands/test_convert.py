"""Published weights in, and out again bit for bit; whatever is wrong is one line, and leaves
nothing behind."""

import dataclasses
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignvlm_jax.commands import config_flag, convert, generate
from alignvlm_jax.data import chat, chat_template, stage_data, tokenizers
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import restore, state
from alignvlm_jax.weights import export, towers
from tests.data import templates
from tests.weights import folders
from tests.weights.tokenizers import write_chatml


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A language model in bfloat16, an encoder, a tokenizer that fits."""
    root = tmp_path_factory.mktemp("published")
    # A context in which a page and a question have room.
    sizes = {"vocab_size": 320, "max_position_embeddings": 4096}
    scaled = {"rope_scaling": folders.LLAMA3_SCALING, **sizes}
    folders.write_llama(root / "llm", "untied", dtype=ml_dtypes.bfloat16, num_shards=2, **scaled)
    folders.write_siglip(root / "vision", is_whole=True)
    write_chatml(root / "llm")
    return root


def convert_to(out, published, *flags):
    convert.main(
        [f"--llm={published / 'llm'}", f"--vision={published / 'vision'}", f"--out={out}", *flags]
    )


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "start"
    convert_to(out, published)
    return out


def tensors_of(folder) -> dict[str, np.ndarray]:
    return {
        name: x
        for path in sorted(folder.glob("*.safetensors"))
        for name, x in load_file(path).items()
    }


def test_counts_are_printed(published, tmp_path, capsys):
    convert_to(tmp_path / "start", published, "--connector=mlp")
    printed = capsys.readouterr().out
    # Arrays of the encoder, the LLM, the connector; ignored are the pooling head's 11, the text
    # tower, two numbers.
    assert all(f"{count} / " in printed for count in (21, 12, 4, 14))


@pytest.mark.parametrize(
    ("context", "seq_len", "told"),
    [
        (100_000, 4096, "Sequences of 4,096 tokens, with pages of up to 9 tiles\n"),
        (0, 4096, "Sequences of 4,096 tokens, with pages of up to 9 tiles\n"),
        (100, 100, "of 100 tokens, with pages of up to 4 tiles; the language model was published"),
    ],
)
def test_sequences_are_no_longer_than_the_language_model_knows(
    published, tmp_path, capsys, context, seq_len, told
):
    shutil.copytree(published / "llm", tmp_path / "llm")
    shutil.copytree(published / "vision", tmp_path / "vision")
    file = tmp_path / "llm" / "config.json"
    fields = json.loads(file.read_text()) | {"max_position_embeddings": context}
    file.write_text(json.dumps(fields))
    convert_to(tmp_path / "start", tmp_path)
    [stage] = json.loads((tmp_path / "start" / "config.json").read_text())
    assert stage["data"]["seq_len"] == seq_len
    assert told in capsys.readouterr().out


def test_import_and_export_give_back_every_tensor_bit_for_bit(
    published, converted, tmp_path, monkeypatch
):
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    convert.main(
        ["--export", f"--checkpoint={converted / 'checkpoints' / '0'}", f"--out={tmp_path / 'out'}"]
    )
    before = tensors_of(published / "llm")
    after = tensors_of(tmp_path / "out" / "llm")
    assert (
        before.keys() == after.keys()
        and len(list((tmp_path / "out" / "llm").glob("*.safetensors"))) > 2
    )
    for name, array in before.items():
        assert array.dtype == after[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array.view(np.uint16), after[name].view(np.uint16))
    index = json.loads((tmp_path / "out" / "llm" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    seen = {
        name: x
        for name, x in tensors_of(published / "vision").items()
        if name.startswith("vision_model.")
    }
    seen = {name: x for name, x in seen.items() if ".head." not in name}
    written = tensors_of(tmp_path / "out" / "vision")
    assert written.keys() == seen.keys()
    for name, array in seen.items():
        np.testing.assert_array_equal(array, written[name])
    assert (tmp_path / "out" / "llm" / "tokenizer.json").exists()
    connector = tensors_of(tmp_path / "out" / "connector")
    np.testing.assert_array_equal(connector["w2.kernel"], before["lm_head.weight"].T)
    # What was written is read again as the same model.
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    convert.main(
        [
            f"--llm={tmp_path / 'again' / 'llm'}",
            f"--vision={tmp_path / 'again' / 'vision'}",
            f"--out={tmp_path / 'b'}",
        ]
    )
    configs = [restore.load_config(path).model for path in (converted, tmp_path / "b")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("variant", "class_name"),
    [
        ("mistral, tied", "LlamaForCausalLM"),
        ("smollm3, untied, scaled", "SmolLM3ForCausalLM"),
        ("smollm3", "SmolLM3ForCausalLM"),
        ("linear", "LlamaForCausalLM"),
        ("qwen3, tied", "Qwen3ForCausalLM"),
    ],
)
def test_every_family_answers_and_comes_back_bit_for_bit(
    published, tmp_path, variant, class_name, capsys
):
    folder = shutil.copytree(published / "llm", tmp_path / "llm")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    folders.write_llama(folder, variant, dtype=ml_dtypes.bfloat16, num_shards=2, vocab_size=320)
    start = tmp_path / "start"
    convert.main([f"--llm={folder}", f"--vision={published / 'vision'}", f"--out={start}"])
    generate.main([f"--checkpoint={start}", "--question=Who?", "--max_new_tokens=3"])
    convert.main(["--export", f"--checkpoint={start}", f"--out={tmp_path / 'out'}"])
    exported = tmp_path / "out" / "llm"
    assert json.loads((exported / "config.json").read_text())["architectures"] == [class_name]
    before = tensors_of(folder)
    after = tensors_of(exported)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array.view(np.uint16), after[name].view(np.uint16))
    again = towers.open_llm(str(exported))
    assert again.config == restore.load_config(start).model.llm


def test_a_head_that_is_not_the_table_is_told(published, tmp_path, capsys):
    folder = shutil.copytree(published, tmp_path / "published")
    config = folder / "llm" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    convert_to(tmp_path / "start", folder)
    assert "tie_word_embeddings is true, but lm_head.weight differs from" in capsys.readouterr().out
    assert not restore.load_config(tmp_path / "start").model.llm.tie_embeddings


def test_the_chat_format_travels_with_the_tokenizer(published, tmp_path, capsys):
    """Of the model's own template, into the checkpoint and out of it again."""
    folder = shutil.copytree(published, tmp_path / "published")
    qwen = templates.FAMILIES["qwen25"]
    settings = {"chat_template": qwen.template, "eos_token": qwen.eos}
    (folder / "llm" / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = chat_template.format_of(tokenizers.load(folder / "llm"))
    assert "Qwen" in expected.start
    convert_to(tmp_path / "start", folder)
    printed = capsys.readouterr().out
    assert f"Chats are written {expected.spell([('QUESTION', 'ANSWER')])!r}" in printed
    config = restore.load_config(tmp_path / "start")
    assert chat_template.format_of(stage_data.load_tokenizer(config.data, config.model)) == expected
    # As after a copy whose template was lost: the format stays.
    (tmp_path / "start" / "tokenizer" / "tokenizer_config.json").unlink()
    assert chat_template.format_of(stage_data.load_tokenizer(config.data, config.model)) == expected
    convert.main(["--export", f"--checkpoint={tmp_path / 'start'}", f"--out={tmp_path / 'out'}"])
    assert chat_template.format_of(tokenizers.load(tmp_path / "out" / "llm")) == expected


def test_a_template_that_is_refused_leaves_nothing(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "published")
    settings = {"chat_template": "{{ messages[0].content }}"}
    (folder / "llm" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json: its chat template is no sequence"
    ):
        convert_to(tmp_path / "out", folder)
    assert not list(tmp_path.glob("out*"))


def test_an_export_holds_nothing_of_the_data(trained_workdir, tmp_path):
    """Whose folder the tokenizer lies in."""
    convert.main(
        [
            "--export",
            f"--checkpoint={trained_workdir}",
            f"--out={tmp_path / 'out'}",
            "--components=llm",
        ]
    )
    assert {path.name for path in (tmp_path / "out" / "llm").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "chat_format.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    data = pathlib.Path(restore.load_config(trained_workdir).data.dir)
    exported = tokenizers.load(tmp_path / "out" / "llm")
    assert chat_template.format_of(exported) == chat_template.format_of(tokenizers.load(data))


def test_what_was_converted_answers_wherever_it_was_moved(converted, tmp_path, capsys):
    moved = shutil.copytree(converted, tmp_path / "moved")
    converted.rename(converted.with_name("away"))
    try:
        generate.main([f"--checkpoint={moved}", "--question=Who?", "--max_new_tokens=3"])
    finally:
        converted.with_name("away").rename(converted)
    assert capsys.readouterr().out


def test_the_image_token_is_one_that_no_text_makes(converted):
    config = restore.load_config(converted)
    assert config.model.image_token_id == config.model.llm.vocab_size == 320


@pytest.mark.parametrize("name", ["finetune", "lora", "smollm2", "documents", "documents_lora"])
def test_a_run_starts_from_what_was_converted(converted, name):
    """On the 2 x 2 x 2 mesh; what the preflight finds wrong it would raise."""
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    stages, _ = config_flag.parse([f"--config=configs/{name}.py:{converted}", *mesh])
    assert stages[0].model.llm == restore.load_config(converted).model.llm
    tokenizer = stage_data.load_tokenizer(stages[0].data, stages[0].model)
    assert chat.stop_ids(tokenizer)
    stage = stages[0]
    read = restore.read_newest(
        pathlib.Path(stage.init_from), lambda source, step: source.stored_params(step)
    )
    model = vlm.VLM(stage.model)
    with pytest.raises(UserError, match=r"3 does not divide over mesh axis tensor of 2"):
        state.abstract_params(model, mesh_lib.make_mesh(stage.mesh, stage.model, stage.train))
    narrow = dataclasses.replace(
        stage, mesh=dataclasses.replace(stage.mesh, data=4, fsdp=2, tensor=1)
    )
    mesh = mesh_lib.make_mesh(narrow.mesh, narrow.model, narrow.train)
    abstract = state.abstract_params(model, mesh)
    wanted = {path: x.shape for path, x in state.flatten(abstract).items()}
    assert {path: x.shape for path, x in read.items()} == wanted
    _, _, params, _ = restore.load_model(converted, mesh)
    for path, x in state.flatten(params).items():
        # For use, in the dtypes of the files; training reads float32.
        assert x.dtype == read[path].dtype
        assert x.sharding == state.flatten(abstract)[path].sharding


@pytest.mark.parametrize("name", ["finetune", "documents", "documents_lora", "trial"])
def test_sequences_have_room_for_the_tiles_of_the_model_and_text(converted, tmp_path, name):
    """Whatever vision encoder it has: of SigLIP at 384 pixels a tile is 729 visual tokens."""
    config = json.loads((converted / "config.json").read_text())
    config[-1]["model"]["vision"] |= {"tile_height": 378, "tile_width": 378}
    config[-1]["model"]["vision"] |= {"patch_height": 14, "patch_width": 14}
    config[-1]["data"]["seq_len"] = 8_192
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(config))
    for folder in (converted, large):
        stages, _ = config_flag.parse([f"--config=configs/{name}.py:{folder}"])
        for stage in stages:
            image_tokens = stage.data.max_tiles * stage.model.tokens_per_tile
            assert 256 <= stage.data.seq_len - image_tokens < 2_560 + 128
            # Splits of the demonstration are no other data's.
            assert stage.eval.splits == ("validation",)
            assert name != "documents_lora" or (
                stage.lora.rank == 16 and stage.train.trainable == ("connector/.*",)
            )


def test_config_files_say_what_to_run_first(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no config\.json: run `make weights` or `convert` first"
    ):
        config_flag.parse([f"--config=configs/finetune.py:{tmp_path}"])
    (tmp_path / "config.json").write_text('{"model_type": "alignvlm"}')
    with pytest.raises(
        UserError, match=r"is no run's: `convert --import` makes a checkpoint of an"
    ):
        config_flag.parse([f"--config=configs/finetune.py:{tmp_path}"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "llm" / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda d: change_config(d, model_type="gpt2"), r"model_type is 'gpt2'; read are: 'llama'"),
        (
            lambda d: change_config(d, attention_bias=True),
            r"attention_bias is True; read are: False",
        ),
        (lambda d: change_config(d, num_hidden_layers=None), r"does not say num_hidden_layers"),
        (
            lambda d: change_config(d, intermediate_size=48),
            r"gate_proj\.weight is \(40, 24\); .* must be \(48, 24\)",
        ),
        (
            lambda d: change_config(d, num_hidden_layers=6),
            r"no parameter of ours is: 9 tensors: model\.layers\.6",
        ),
        (
            lambda d: next((d / "llm").glob("*00001*.safetensors")).unlink(),
            r"lacks 1 of 2 shards: model-00001",
        ),
        (
            lambda d: cut(next((d / "llm").glob("*-00002-of*"))),
            r"00002-of-00002\.safetensors is damaged or cut",
        ),
        (
            lambda d: shutil.rmtree(d / "llm"),
            r"llm does not exist, and is no package of weights that is known",
        ),
        (
            lambda d: (d / "llm" / "tokenizer.json").unlink(),
            r"llm holds no tokenizer\.json or tokenizer\.model",
        ),
        (
            lambda d: write_chatml(d / "llm", vocab_size=400),
            r"tokenizer .* has 3\d\d tokens, .*vocab_size is 320",
        ),
        (
            lambda d: write_chatml(d / "llm", special_tokens=("<pad>",)),
            r"special tokens of no chat format",
        ),
        (
            lambda d: spoil_tensor(d / "vision" / "model.safetensors", np.nan),
            r"post_layernorm\.weight holds numbers",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(published, tmp_path, spoil, message):
    folder = shutil.copytree(published, tmp_path / "published")
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        convert_to(tmp_path / "out", folder)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out*"))


def change_config(folder, **fields):
    path = folder / "llm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def spoil_tensor(path, value):
    tensors = load_file(path)
    tensors["vision_model.post_layernorm.weight"][3] = value
    save_file(tensors, path)


def test_an_output_that_exists_is_refused(published, converted):
    with pytest.raises(UserError, match=r"start exists; take another --out"):
        convert_to(converted, published)
    with pytest.raises(UserError, match=r"start exists; take another --out"):
        convert.main(["--export", f"--checkpoint={converted}", f"--out={converted}"])


def test_an_unknown_connector_or_part(published, converted, tmp_path):
    with pytest.raises(UserError, match=r"'alin'; did you mean 'align'"):
        convert_to(tmp_path / "out", published, "--connector=alin")
    with pytest.raises(UserError, match=r"'visoin' in --components; did you mean 'vision'"):
        convert.main(
            [
                "--export",
                f"--checkpoint={converted}",
                f"--out={tmp_path / 'out'}",
                "--components=llm,visoin",
            ]
        )


@pytest.mark.parametrize("flags", [["--out=x"], ["--export", "--out=x"], ["--llm=a", "--vision=b"]])
def test_missing_flags_are_wrong_usage(flags):
    with pytest.raises(SystemExit) as exit_info:
        convert.main(flags)
    assert exit_info.value.code == 2
