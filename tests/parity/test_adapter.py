"""LoRA's factors as an adapter that PEFT loads onto the exported language model."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from alignvlm_jax.commands import convert
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import restore
from tests.parity.table import record
from tests.weights import folders, lora_runs
from tests.weights.tokenizers import write_chatml

TOLERANCE = 2e-4


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("untied", {"rope_scaling": folders.LLAMA3_SCALING}),
        ("mistral", {}),
        ("qwen2, untied", {}),
        ("qwen3, tied", {}),
        ("smollm3", {}),
    ],
)
def test_logits(tmp_path, variant, changes):
    """Ours are of the merged model; PEFT's of the base with the factors beside it, unmerged."""
    folders.write_llama(tmp_path / "llm", variant, vocab_size=320, **changes)
    folders.write_siglip(tmp_path / "vision", is_whole=True)
    write_chatml(tmp_path / "llm")
    towers = [f"--llm={tmp_path / 'llm'}", f"--vision={tmp_path / 'vision'}"]
    convert.main([*towers, f"--out={tmp_path / 'base'}"])
    is_tied = folders.DECODERS[variant].get("tie_word_embeddings", False)
    targets = (*lora_runs.TARGETS, *(() if is_tied else ("llm/head/kernel",)))
    lora_runs.write(tmp_path / "run", tmp_path / "base", targets=targets)
    export = ["--export", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    convert.main([*export, "--adapter"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "llm")
    tokens = np.random.default_rng(1).integers(0, 320, (2, 17))
    ids = torch.tensor(tokens)
    with torch.no_grad():
        before = base(ids).logits.numpy()
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        expected = adapted(ids).logits.numpy()
    _, model, params, _ = restore.load_model(tmp_path / "run", mesh_lib.single_device())
    batch = {
        "tokens": tokens.astype(np.int32),
        "positions": np.tile(np.arange(17, dtype=np.int32), (2, 1)),
        "segment_ids": np.ones((2, 17), np.int32),
    }
    ours = np.asarray(jax.jit(model.apply)({"params": params}, batch).logits)
    name = "llama" if variant == "untied" else variant
    record("LoRA of every kernel, by peft", name, ours, expected, TOLERANCE)
    assert np.abs(before - expected).max() > 0.1
