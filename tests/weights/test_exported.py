"""What leaves the house, and comes back bit for bit."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import alignvlm_jax
from alignvlm_jax.commands import convert, generate
from alignvlm_jax.data import chat, chat_template, tokenizers
from alignvlm_jax.data.tokenizers.base import ChatFiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading
from alignvlm_jax.models import connectors
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import restore, state
from alignvlm_jax.weights import export, exported, published
from tests import exports
from tests.data import templates
from tests.weights import folders
from tests.weights.tokenizers import write_chatml


def page(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))


def export_to(out, checkpoint, *flags):
    convert.main(["--export", f"--checkpoint={checkpoint}", f"--out={out}", *flags])
    return out


def params_of(path) -> dict[str, np.ndarray]:
    read = restore.read_model
    mesh = mesh_lib.single_device()
    _, _, params, _ = exported.read(path, lambda found, step: read(mesh, found, step))
    return {name: np.asarray(x) for name, x in state.flatten(params).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        # Shapes that the padding is cut from.
        array = array[tuple(map(slice, found[name].shape))]
        np.testing.assert_array_equal(found[name].view(np.uint8), array.view(np.uint8))


@pytest.fixture(scope="module")
def workdir(trained_workdir, tmp_path_factory):
    """Of oblong tiles, with padding in the tables."""
    folder = tmp_path_factory.mktemp("padded")
    exports.write_workdir(folder, trained_workdir, "align")
    return folder


@pytest.fixture(scope="module", params=export.LAYOUTS)
def out(request, workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "model"
    return export_to(folder, workdir, f"--format={request.param}")


@pytest.mark.parametrize("connector", connectors.REGISTRY)
def test_parameters_are_read_back_bit_for_bit(connector, trained_workdir, tmp_path):
    config = exports.write_workdir(tmp_path / "run", trained_workdir, connector)
    before = params_of(tmp_path / "run")
    after = params_of(export_to(tmp_path / "out", tmp_path / "run"))
    assert_same(after, before)
    assert after["llm/embed/table"].shape[0] == config.model.llm.unpadded_vocab_size
    # What is only like an axis over the vocabulary is not cut.
    if connector == "ovis":
        assert after["connector/table"].shape == before["connector/table"].shape


def test_parameters_come_back_bit_for_bit(workdir, out, tmp_path):
    before = params_of(workdir)
    convert.main([f"--import={out}", f"--out={tmp_path / 'back'}"])
    for folder in (out, tmp_path / "back"):
        assert_same(params_of(folder), before)


def test_it_answers_the_same(workdir, out, tmp_path, capsys):
    """Also padded tokens would show: nothing keeps an export from them but that they are gone."""
    pages = [page(i) for i in range(4)]
    questions = ["Who?", "What is the total?", "a b", "b"]
    expected = alignvlm_jax.load(workdir).answer(pages, questions)
    assert len(set(expected)) > 1
    assert alignvlm_jax.load(out).answer(pages, questions) == expected
    pages[0].save(tmp_path / "page.png")
    capsys.readouterr()
    generate.main([f"--checkpoint={out}", f"--image={tmp_path / 'page.png'}", "--question=Who?"])
    assert capsys.readouterr().out.rstrip() == expected[0].rstrip()


def test_an_export_is_exported_again_as_the_other(workdir, tmp_path):
    first = export_to(tmp_path / "first", workdir)
    whole = export_to(tmp_path / "whole", first, "--format=transformers")
    again = export_to(tmp_path / "again", whole)
    names = sorted(one.relative_to(first) for one in first.rglob("*") if one.is_file())
    assert names == sorted(one.relative_to(again) for one in again.rglob("*") if one.is_file())
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_nothing_of_the_house_is_in_it(workdir, trained_workdir, out):
    """No folder's name, and no file but the model's own."""
    texts = [one.read_text() for one in out.rglob("*") if one.suffix in (".json", ".md", ".jinja")]
    assert not [text for text in texts if str(trained_workdir) in text or str(workdir) in text]
    llm = {"tokenizer.model", "chat_format.json", "chat_template.jinja", "generation_config.json"}
    tensors = {"config.json", "model.safetensors"}
    found = {str(one.relative_to(out)) for one in out.rglob("*") if one.is_file()}
    if (out / "llm").exists():
        assert found == {
            "alignvlm.json",
            *(f"llm/{name}" for name in llm | tensors),
            *(f"{component}/{name}" for component in ("vision", "connector") for name in tensors),
        }
    else:
        code = {*published.CODE, "processor_config.json", "README.md"}
        assert found == {"alignvlm.json", *llm, *tensors, *code}


def test_whoever_may_read_the_folder_may_read_its_tensors(out):
    modes = {one.stat().st_mode for one in out.rglob("*") if one.is_file()}
    assert len(modes) == 1


def test_descriptions_lose_paths_and_listings():
    described = {
        "format": "jsonl",
        "dpi": 144,
        "source": "/home/me/secret/records.jsonl",
        "bucket": "gs://mine/records",
        "data_set": "someone/DocumentVQA",
        "listing": [["/home/me/secret/a.pdf", 3]],
        "checks": {"a": 1},
    }
    assert exported.public(described) == {
        "format": "jsonl",
        "dpi": 144,
        "source": "records.jsonl",
        "bucket": "records",
        "data_set": "someone/DocumentVQA",
    }


def test_it_says_where_to_stop_and_how_long_a_sequence_may_be(workdir, out):
    folder = out / "llm" if (out / "llm").exists() else out
    tokenizer = tokenizers.load(folder)
    config = restore.load_config(workdir)
    generation = json.loads((folder / "generation_config.json").read_text())
    end = tokenizer.special_tokens["<end>"]
    assert generation["eos_token_id"] == [end] == list(chat.stop_ids(tokenizer))
    assert generation["bos_token_id"] == tokenizer.special_tokens["<s>"]
    assert generation["pad_token_id"] == tokenizer.special_tokens["<pad>"]
    assert generation["max_new_tokens"] == config.eval.max_new_tokens
    fields = json.loads((folder / "config.json").read_text())
    llm = fields.get("text_config", fields)
    # Nobody published these weights: their sequences were as long as in the training.
    assert llm["max_position_embeddings"] == config.data.seq_len
    assert llm["eos_token_id"] == [end] and llm["vocab_size"] == tokenizer.vocab_size


def test_its_template_is_the_chat_format(out):
    folder = out / "llm" if (out / "llm").exists() else out
    chat_format = chat_template.format_of(tokenizers.load(folder))
    written = (folder / "chat_template.jinja").read_text()
    template = chat_template.Template(ChatFiles("written", template=written))
    turn = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann"}]
    assert template.render(turn, False) == chat_format.spell([("Who?", "Ann")])
    assert template.render(turn[:1], True) == chat_format.spell((), "Who?")


def test_alignvlm_json_says_what_is_needed_to_use_it(workdir, out):
    config = restore.load_config(workdir)
    told = json.loads((out / exported.FILE).read_text())
    vision = config.model.vision
    expected = {
        "tile_height": vision.tile_height,
        "tile_width": vision.tile_width,
        "max_tiles": config.data.max_tiles,
        "use_overview": config.data.use_overview,
        "pixel_mean": list(vision.pixel_mean),
        "pdf_dpi": 100,
        "image_token_id": 4,
        "seq_len": config.data.seq_len,
    }
    assert told["input"].items() >= expected.items()
    assert told["components"]["vision"] == export.OWN_NAMES
    assert told["metadata"]["step"] == 7 and told["metadata"]["num_sequences"] == 56
    assert told["metadata"]["libraries"]["jax"] == jax.__version__


def test_scores_are_told_of_the_checkpoint_that_they_are_of(workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "run")
    scores = {"anls": 0.8125, "step": 7, "tasks": {"docvqa": {"anls": 0.75}}, "seed": 0}
    (folder / "summary.json").write_text(json.dumps(scores))
    card = (export_to(tmp_path / "a", folder, "--format=transformers") / "README.md").read_text()
    assert "| anls | 0.8125 |" in card and "| docvqa: anls | 0.75 |" in card
    assert "56 sequences with pages" in card
    (folder / "summary.json").write_text(json.dumps(scores | {"step": 5}))
    card = (export_to(tmp_path / "b", folder, "--format=transformers") / "README.md").read_text()
    assert "0.8125" not in card and "It was not evaluated." in card


def test_a_card_says_what_is_not_known(half, tmp_path):
    """An untrained connector, and no licence."""
    card = (export_to(tmp_path / "out", half, "--format=transformers") / "README.md").read_text()
    assert "The connector is untrained" in card and "trained by" not in card
    assert "Of its licence nothing is known here" in card


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_a_full_disk_is_one_line_and_leaves_nothing(workdir, tmp_path, monkeypatch, layout):
    def full(tensors, path, metadata):
        path.write_bytes(b"a")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(
        UserError, match=r"it takes 0\.\d MB and .* MB are free .*No space"
    ) as error:
        export_to(tmp_path / "out", workdir, f"--format={layout}")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A converted model whose towers were published in bfloat16, with a template of its own."""
    root = tmp_path_factory.mktemp("half")
    folders.write_llama(
        root / "llm",
        "untied",
        dtype=ml_dtypes.bfloat16,
        vocab_size=320,
        max_position_embeddings=1999,
    )
    folders.write_siglip(root / "vision")
    write_chatml(root / "llm")
    qwen = templates.FAMILIES["qwen25"]
    settings = {"chat_template": qwen.template, "eos_token": qwen.eos, "pad_token": "<|endoftext|>"}
    (root / "llm" / "tokenizer_config.json").write_text(json.dumps(settings))
    flags = [f"--{name}={root / name}" for name in ("llm", "vision")]
    convert.main([*flags, f"--out={root / 'start'}"])
    return root / "start"


def test_published_weights_keep_their_context_length_template_and_precision(half, tmp_path):
    out = export_to(tmp_path / "out", half)
    config = json.loads((out / "llm" / "config.json").read_text())
    assert config["max_position_embeddings"] == 1999 and config["torch_dtype"] == "bfloat16"
    template = templates.FAMILIES["qwen25"].template
    assert (out / "llm" / "chat_template.jinja").read_text() == template
    known = tokenizers.load(out / "llm").special_tokens
    assert config["eos_token_id"] == [known["<|im_end|>"], known["<|endoftext|>"]]
    assert config["pad_token_id"] == known["<|endoftext|>"] and config["bos_token_id"] is None
    convert.main([f"--import={out}", f"--out={tmp_path / 'back'}"])
    assert_same(params_of(tmp_path / "back"), params_of(half))
    tensors = load_file(out / "connector" / "model.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"float32", "bfloat16"}


def test_an_encoder_in_another_half_precision_than_the_llm_is_exported_with_it(tmp_path):
    """Numpy knows no type that holds float16 and bfloat16."""
    folders.write_llama(tmp_path / "llm", "untied", dtype=ml_dtypes.bfloat16, vocab_size=320)
    folders.write_siglip(tmp_path / "vision")
    path = tmp_path / "vision" / "model.safetensors"
    tensors = {name: x.astype(np.float16) for name, x in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    write_chatml(tmp_path / "llm")
    flags = [f"--{name}={tmp_path / name}" for name in ("llm", "vision")]
    convert.main([*flags, f"--out={tmp_path / 'start'}"])
    out = export_to(tmp_path / "out", tmp_path / "start", "--format=transformers")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    dtypes = {str(x.dtype) for x in load_file(out / "model.safetensors").values()}
    assert dtypes == {"float16", "bfloat16", "float32"}


def test_a_template_that_contradicts_the_format_is_written_anew(half, tmp_path):
    """A chat_format.json goes before all else."""
    folder = shutil.copytree(half, tmp_path / "start")
    path = folder / "tokenizer" / "chat_format.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start": "Hello "}))
    out = export_to(tmp_path / "out", folder, "--components=llm")
    template = (out / "llm" / "chat_template.jinja").read_text()
    assert "Hello " in template and template != templates.FAMILIES["qwen25"].template


def test_what_is_loaded_keeps_the_precision_of_its_file(half, trained_workdir):
    model = alignvlm_jax.load(half).loaded
    llm = jax.tree.leaves(model.params["llm"])
    # 2 bytes a number, where float32 would be 4.
    assert {x.dtype for x in llm} == {np.dtype(ml_dtypes.bfloat16)}
    assert sum(x.nbytes for x in llm) == 2 * sum(x.size for x in llm)
    assert {str(x.dtype) for x in jax.tree.leaves(model.params["vision"])} == {"float32"}
    # On CPU it computes in float32, as the config says.
    assert model.config.model.dtype == "float32"
    trained = alignvlm_jax.load(trained_workdir).loaded
    assert {str(x.dtype) for x in jax.tree.leaves(trained.params)} == {"float32"}


def test_half_precision_answers_as_the_same_numbers_in_float32(half):
    loaded = alignvlm_jax.load(half).loaded
    wide = jax.tree.map(lambda x: x.astype(np.float32), loaded.params)
    other = alignvlm_jax.inference.assistant.Assistant(dataclasses.replace(loaded, params=wide))
    mine = alignvlm_jax.inference.assistant.Assistant(loaded)
    image = page(1).resize((48, 24))
    with pytest.warns(UserWarning):
        assert mine.answer(image, "Who?") == other.answer(image, "Who?")


def spoil(name, **fields):
    def act(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return act


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-50])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d: (d / exported.FILE).unlink(), r"holds no alignvlm\.json: it is no model that"),
        (lambda d: (d / exported.FILE).write_text("{"), r"alignvlm\.json is damaged"),
        (spoil(exported.FILE, format_version=9), r"format_version 9; this version reads 1"),
        (spoil(exported.FILE, metadata={}), r"alignvlm\.json is damaged: KeyError 'config'"),
        (spoil(exported.FILE, layout="onnx"), r"layout is 'onnx'"),
        (spoil(exported.FILE, components={"llm": "x"}), r"exported without vision, connector"),
        (lambda d: shutil.rmtree(d / "vision"), r"vision holds neither model\.safetensors nor"),
        (cut("llm/model.safetensors"), r"llm/model\.safetensors is damaged or cut short"),
        (
            lambda d: shutil.copy(
                d / "connector" / "model.safetensors", d / "vision" / "model.safetensors"
            ),
            r"vision lacks 21 tensors: ",
        ),
        (lambda d: (d / "llm" / "tokenizer.model").unlink(), r"llm holds no tokenizer\.json or"),
        (lambda d: (d / "llm" / "chat_format.json").unlink(), r"with a chat_format\.json beside"),
    ],
)
def test_a_damaged_export_is_refused_by_name(workdir, tmp_path, act, message):
    out = export_to(tmp_path / "out", workdir)
    act(out)
    with pytest.raises(UserError, match=message) as error:
        convert.main([f"--import={out}", f"--out={tmp_path / 'back'}"])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("back*"))


def test_a_part_of_a_model_is_no_model(workdir, tmp_path):
    out = export_to(tmp_path / "out", workdir, "--components=llm,connector")
    with pytest.raises(UserError, match=r"was exported without vision: export all components"):
        alignvlm_jax.load(out)
    with pytest.raises(UserError, match=r"--format=transformers is the whole model"):
        export_to(tmp_path / "b", workdir, "--components=llm", "--format=transformers")
    with pytest.raises(UserError, match=r"unknown --format 'transfromers'; did you mean"):
        export_to(tmp_path / "b", workdir, "--format=transfromers")


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("tiling", "lines", "'lines' is not exported: .* grid"),
        ("blank_contrast", 9, "9 is .* every"),
    ],
)
def test_an_export_keeps_how_pages_are_read_and_transformers_knows_a_grid_alone(
    trained_workdir, tmp_path, monkeypatch, capsys, field, value, why
):
    config = restore.load_config(trained_workdir)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **{field: value}))
    monkeypatch.setattr(restore, "load_config", lambda *args: config)
    exports.write_workdir(tmp_path / "run", trained_workdir, "align")
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"^config\.data\.{field} {why}"):
        export_to(tmp_path / "a", tmp_path / "run", "--format=transformers")
    assert not (tmp_path / "a").exists()
    out = export_to(tmp_path / "out", tmp_path / "run")
    assert getattr(loading.load_config(out).data, field) == value
    # A page without lines is one tile; a grid would cut it into two.
    Image.new("RGB", (16, 16), "white").save(tmp_path / "page.png")
    capsys.readouterr()
    generate.main([f"--checkpoint={out}", f"--image={tmp_path / 'page.png'}", "--question=Who?"])
    tiles = {"tiling": "1 tile", "blank_contrast": "2 tiles"}[field]
    assert f"16 x 16 pixels, {tiles}\n" in capsys.readouterr().err


@pytest.mark.parametrize("layout", export.LAYOUTS)
def test_an_export_has_text_in_the_unit_of_its_training(
    trained_workdir, tmp_path, monkeypatch, layout
):
    config = restore.load_config(trained_workdir)
    data = dataclasses.replace(config.data, text_unit="letter")
    monkeypatch.setattr(
        restore, "load_config", lambda *args: dataclasses.replace(config, data=data)
    )
    exports.write_workdir(tmp_path / "run", trained_workdir, "align")
    monkeypatch.undo()
    out = export_to(tmp_path / "out", tmp_path / "run", f"--format={layout}")
    assert loading.load_config(out).data.text_unit == "letter"
    name = "processor_config.json" if layout == "transformers" else exported.FILE
    told = json.loads((out / name).read_text())
    assert told.get("input", told)["text_unit"] == "letter"


def test_a_run_cannot_start_from_an_export_and_says_what_can(out):
    with pytest.raises(UserError, match=r"becomes one by `convert --import`"):
        restore.load_config(out)
