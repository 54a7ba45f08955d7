"""Imported towers against the reference implementations, side by side, and what is exported in
their hands."""

import json

import numpy as np
import pytest
import transformers

from alignvlm_jax.commands import convert
from alignvlm_jax.weights import towers
from tests.parity import reference
from tests.parity.table import record
from tests.weights import folders
from tests.weights.apply import run_llm, run_vision
from tests.weights.tokenizers import write_chatml

TOLERANCE = 2e-4


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("variant", folders.DECODERS)
def test_decoder(tmp_path, variant, seed):
    folder = folders.write_llama(tmp_path, variant, seed)
    tokens = np.random.default_rng(seed).integers(0, folders.LLAMA["vocab_size"], (2, 48))
    ours = run_llm(towers.open_llm(str(folder)), tokens)
    expected = reference.llm_logits(folder, tokens)
    record(f"{family(folder)}, random", f"{variant}, seed {seed}", ours, expected, TOLERANCE)


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("variant", folders.DECODERS)
def test_decoders_of_random_sizes(tmp_path, variant, seed):
    sizes = folders.random_sizes(seed)
    # Lists of layers, which are of seven.
    lists = ("layer_types", "no_rope_layers")
    layers = {name: None for name in lists if name in folders.DECODERS[variant]}
    folder = folders.write_llama(tmp_path, variant, seed, **sizes, **layers)
    tokens = np.random.default_rng(seed).integers(0, sizes["vocab_size"], (3, 57))
    ours = run_llm(towers.open_llm(str(folder)), tokens)
    expected = reference.llm_logits(folder, tokens)
    record(f"{family(folder)}, random", f"{variant}, sizes {seed}", ours, expected, TOLERANCE)


def family(folder) -> str:
    """Llama, Qwen2, ... of the class that a config.json names."""
    [name] = json.loads((folder / "config.json").read_text())["architectures"]
    return name.removesuffix("ForCausalLM")


@pytest.mark.parametrize("options", [{}, {"is_whole": True}, {"is_naflex": True}], ids=str)
def test_siglip(tmp_path, options):
    folder = folders.write_siglip(tmp_path, seed=3, **options)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    ours = run_vision(towers.open_vision(str(folder)), pixels)
    kind = (
        "SigLIP 2 NaFlex"
        if "is_naflex" in options
        else "SigLIP inside SiglipModel"
        if options
        else "SigLIP"
    )
    record(f"{kind}, random", "seed 3", ours, reference.siglip_features(folder, pixels), TOLERANCE)


@pytest.mark.parametrize("size", [24, 36, 18])
def test_dinov2(tmp_path, size):
    folder = folders.write_dinov2(tmp_path, seed=4)
    pixels = np.random.default_rng(4).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    ours = run_vision(towers.open_vision(str(folder), size), pixels)
    expected = reference.dinov2_features(folder, pixels)
    record(
        "DINOv2, random, no class token", f"{size} pixels, table of 24", ours, expected, TOLERANCE
    )


@pytest.mark.parametrize(
    "variant",
    [
        "untied",
        "scaled, transformers 5",
        "qwen2, untied",
        "qwen2, tied",
        "qwen3, untied",
        *folders.OTHERS,
    ],
)
def test_exported_models_are_read_by_transformers(tmp_path, variant):
    folders.write_llama(tmp_path / "llm", variant, seed=5, vocab_size=320)
    folders.write_siglip(tmp_path / "vision", seed=5)
    write_chatml(tmp_path / "llm")
    convert.main(
        [
            *(f"--{part}={tmp_path / part}" for part in ("llm", "vision")),
            f"--out={tmp_path / 'start'}",
        ]
    )
    convert.main(["--export", f"--checkpoint={tmp_path / 'start'}", f"--out={tmp_path / 'out'}"])
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 320, (2, 40))
    pixels = rng.integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    before, after = (
        reference.llm_logits(folder / "llm", tokens) for folder in (tmp_path, tmp_path / "out")
    )
    np.testing.assert_array_equal(after, before)
    before, after = (
        reference.siglip_features(folder / "vision", pixels)
        for folder in (tmp_path, tmp_path / "out")
    )
    np.testing.assert_array_equal(after, before)


def test_the_exported_tokenizer_is_read_by_transformers(tmp_path):
    reference_tokenizer = write_chatml(tmp_path)
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "The total is 318.40"
    assert loaded(text).input_ids == reference_tokenizer.encode(text).ids
