"""An export in the hands of transformers: the whole model by its remote code, and the language
model alone with prompt embeddings."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import alignvlm_jax
from alignvlm_jax.commands import convert
from alignvlm_jax.data import chat, images, loader
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import connectors
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import restore
from tests import exports
from tests.conftest import tiny_connector
from tests.parity.table import record
from tests.weights import folders
from tests.weights.tokenizers import write_chatml

TOLERANCE = 2e-4
QUESTION = "What is the total?"
DEMONSTRATION = pathlib.Path("runs/demo")
SMOLLM2 = pathlib.Path("weights/smollm2")


def export(checkpoint, out, layout="transformers"):
    convert.main(["--export", f"--checkpoint={checkpoint}", f"--out={out}", f"--format={layout}"])
    return out


class Theirs:
    """The exported folder as transformers loads it."""

    def __init__(self, folder):
        options = {"trust_remote_code": True}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        ).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder, **options)

    @torch.no_grad()
    def logits(self, page, question) -> np.ndarray:
        return self.model(**self.processor(images=page, text=question)).logits[0].numpy()

    @torch.no_grad()
    def answers(self, pages, questions, **options) -> list[list[int]]:
        inputs = self.processor(images=pages, text=questions)
        out = self.model.generate(**inputs, **options)
        return out[:, inputs["input_ids"].shape[1] :].tolist()


def our_logits(loaded, page, question) -> np.ndarray:
    """Logits [T, V] of the tokens of a prompt, without those that pad the vocabulary."""
    prompt = loaded.builder.prompt(page, question)
    [trimmed] = loaded.builder.trim_prompts([prompt])
    logits = jax.jit(loaded.model.apply)(loaded.variables, loader.stack([trimmed])).logits[0]
    length = int(prompt["segment_ids"].sum())
    return np.asarray(logits)[:length, : loaded.config.model.llm.unpadded_vocab_size]


def our_answer(loaded, page, question, num_new, end_ids=None) -> list[int]:
    """The tokens of an answer, with its end."""
    [trimmed] = loaded.builder.trim_prompts([loaded.builder.prompt(page, question)])
    sampler = loaded.sampler(end_ids)
    tokens = sampler.generate(loaded.variables, loader.stack([trimmed]), num_new)[0].tolist()
    ends = end_ids or chat.stop_ids(loaded.tokenizer)
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), num_new)]


def noise(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def on_one_device(folder):
    """A row alone does not divide over eight devices."""
    loaded = alignvlm_jax.load(folder).loaded
    mesh = mesh_lib.single_device()
    _, _, params, _ = restore.load_model(folder, mesh)
    return dataclasses.replace(loaded, mesh=mesh, params=params)


@pytest.mark.parametrize("connector", connectors.REGISTRY)
def test_every_connector(connector, trained_workdir, tmp_path):
    """Oblong tiles, one and two of them; padding in the tables."""
    exports.write_workdir(tmp_path / "run", trained_workdir, connector)
    loaded = on_one_device(tmp_path / "run")
    theirs = Theirs(export(tmp_path / "run", tmp_path / "out"))
    for height in (8, 16):
        page = noise(height, 16, height)
        record(
            "Export in transformers, random",
            f"{connector}, tiles: {height // 8}",
            our_logits(loaded, page, QUESTION),
            theirs.logits(page, QUESTION),
            TOLERANCE,
        )
    answer = our_answer(loaded, page, QUESTION, 12, (-1,))
    forced = {"max_new_tokens": 12, "min_new_tokens": 12, "eos_token_id": None}
    theirs.model.generation_config.eos_token_id = None
    assert theirs.answers(page, QUESTION, **forced) == [answer]
    # Together with prompts of other lengths, and one without a page.
    questions = [QUESTION, "Who?", "a b"]
    many = theirs.answers([page, noise(3, 16, 8), None], questions, **forced)
    assert many[0] == answer and many[2] == our_answer(loaded, None, "a b", 12, (-1,))


@pytest.mark.parametrize(
    "variant",
    [
        *("qwen2, untied", "qwen3, tied", "scaled, transformers 5", "mistral"),
        *("smollm3", "smollm3, untied, scaled"),
    ],
)
def test_every_family_with_square_tiles_overview_and_a_template(variant, tmp_path):
    folders.write_llama(
        tmp_path / "llm", variant, seed=5, vocab_size=320, max_position_embeddings=4096
    )
    folders.write_siglip(tmp_path / "vision", seed=5)
    write_chatml(tmp_path / "llm")
    parts = [f"--{name}={tmp_path / name}" for name in ("llm", "vision")]
    convert.main([*parts, f"--out={tmp_path / 'start'}"])
    loaded = on_one_device(tmp_path / "start")
    theirs = Theirs(export(tmp_path / "start", tmp_path / "out"))
    page = noise(1, 70, 40)
    ours = our_logits(loaded, page, "  Who?\n")
    expected = theirs.logits(page, "  Who?\n")
    record("Export in transformers, random", f"{variant}, overview", ours, expected, TOLERANCE)


@pytest.mark.parametrize(
    ("connector", "options"),
    [
        ("align", {"weights": "linear"}),
        ("align", {"use_ln2": False}),
        ("align", {"top_k": 3}),
        ("ovis", {"top_k": 3}),
    ],
)
def test_every_option_of_an_average(connector, options, trained_workdir, tmp_path, monkeypatch):
    changed = dataclasses.replace(tiny_connector(connector), **options)
    monkeypatch.setattr(exports, "tiny_connector", {connector: changed}.get)
    exports.write_workdir(tmp_path / "run", trained_workdir, connector)
    loaded = on_one_device(tmp_path / "run")
    page = noise(4, 16, 16)
    expected = Theirs(export(tmp_path / "run", tmp_path / "out")).logits(page, QUESTION)
    ours = our_logits(loaded, page, QUESTION)
    name = f"{connector}, {options}"
    record("Export in transformers, random", name, ours, expected, TOLERANCE)


@pytest.mark.parametrize("connector", ["align", "perceiver"])
def test_the_language_model_alone_takes_prompt_embeddings(connector, trained_workdir, tmp_path):
    exports.write_workdir(tmp_path / "run", trained_workdir, connector)
    out = export(tmp_path / "run", tmp_path / "out", "components")
    assistant = alignvlm_jax.load(tmp_path / "run")
    page = noise(2, 16, 16)
    expected = our_answer(on_one_device(tmp_path / "run"), page, QUESTION, 10)
    assert answer_of_embeddings(out / "llm", assistant.embed(page, QUESTION), 10) == expected
    # From the export as well.
    again = alignvlm_jax.load(out).embed(page, QUESTION)
    assert answer_of_embeddings(out / "llm", again, 10) == expected


@torch.no_grad()
def answer_of_embeddings(folder, embeddings: np.ndarray, num_new: int) -> list[int]:
    llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    x = torch.tensor(embeddings)[None]
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    return llm.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=num_new)[0].tolist()


def test_what_is_saved_again_is_loaded_again(trained_workdir, tmp_path):
    """By a program that has fine-tuned it in PyTorch."""
    exports.write_workdir(tmp_path / "run", trained_workdir, "align")
    theirs = Theirs(export(tmp_path / "run", tmp_path / "out"))
    page = noise(2, 16, 16)
    before = theirs.logits(page, QUESTION)
    theirs.model.save_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(Theirs(tmp_path / "out").logits(page, QUESTION), before)
    assert alignvlm_jax.load(tmp_path / "out").loaded.step == 7


def test_the_demonstration(tmp_path):
    """Its oblong tower, on its own documents."""
    if not (DEMONSTRATION / "checkpoints").exists():
        pytest.skip("no runs/demo: `make demo` trains it")
    loaded = on_one_device(DEMONSTRATION)
    theirs = Theirs(export(DEMONSTRATION, tmp_path / "out"))
    try:
        source = RecordSource(loaded.config.data.dir, "seen_fonts")
    except UserError as err:
        pytest.skip(str(err))
    for i in range(5):
        one = source[i]
        page = images.decode_image(one.images[0], "page")
        question = one.turns[0].question
        expected = our_answer(loaded, page, question, loaded.config.eval.max_new_tokens)
        assert theirs.answers(page, question) == [expected]


def test_smollm2_with_a_random_connector(tmp_path):
    if not SMOLLM2.exists():
        pytest.skip("no weights/smollm2: `make weights` writes it")
    loaded = on_one_device(SMOLLM2)
    theirs = Theirs(export(SMOLLM2, tmp_path / "out"))
    page = noise(1, 224, 224)
    answer = our_answer(loaded, page, QUESTION, 8)
    assert theirs.answers(page, QUESTION, max_new_tokens=8) == [answer]
