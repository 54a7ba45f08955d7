"""What `convert --export` makes of a run with LoRA: merged, or as an adapter of PEFT."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import alignvlm_jax
from alignvlm_jax.commands import convert
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import restore
from tests.weights import folders, lora_runs
from tests.weights.tokenizers import write_chatml

SCALE = 6.0 / 3


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The base, the merged export and the one with an adapter."""
    root = tmp_path_factory.mktemp("lora")
    folders.write_llama(root / "llm", "untied", vocab_size=320)
    folders.write_siglip(root / "vision", is_whole=True)
    write_chatml(root / "llm")
    towers = [f"--llm={root / 'llm'}", f"--vision={root / 'vision'}"]
    convert.main([*towers, f"--out={root / 'base'}"])
    lora_runs.write(root / "run", root / "base")
    export = ["--export", f"--checkpoint={root / 'run'}"]
    convert.main([*export, f"--out={root / 'merged'}"])
    convert.main([*export, "--adapter", f"--out={root / 'beside'}"])
    convert.main(["--export", f"--checkpoint={root / 'base'}", f"--out={root / 'plain'}"])
    return root


def tensors_of(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def test_the_merged_model_is_the_base_and_the_adapters_products(exports):
    """In PyTorch's layout, [out, in], as PEFT computes them: B A alpha / rank."""
    base, merged = (tensors_of(exports / name / "llm") for name in ("plain", "merged"))
    adapter = load_file(exports / "beside" / "adapter" / "adapter_model.safetensors")
    assert base.keys() == merged.keys()
    changed = 0
    for name, array in base.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{path}.lora_A.weight" not in adapter:
            np.testing.assert_array_equal(merged[name], array)
            continue
        a, b = (adapter[f"{path}.lora_{letter}.weight"] for letter in "AB")
        assert a.shape == (3, array.shape[1]) and b.shape == (array.shape[0], 3)
        np.testing.assert_allclose(merged[name], array + SCALE * b @ a, atol=1e-5, err_msg=name)
        assert np.abs(merged[name] - array).max() > 1e-2
        changed += 1
    # Seven kernels of each of seven layers.
    assert 2 * changed == len(adapter) == 2 * 7 * 7


def test_beside_an_adapter_the_language_model_is_as_before_and_the_rest_merged(exports):
    base, beside = (tensors_of(exports / name / "llm") for name in ("plain", "beside"))
    for name, array in base.items():
        np.testing.assert_array_equal(beside[name], array)
    connectors = [tensors_of(exports / n / "connector") for n in ("plain", "beside", "merged")]
    np.testing.assert_array_equal(connectors[1]["w1.kernel"], connectors[2]["w1.kernel"])
    assert not np.array_equal(connectors[0]["w1.kernel"], connectors[1]["w1.kernel"])
    fields = json.loads((exports / "beside" / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["peft_type"]) == (3, 6.0, "LORA")
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert fields["target_modules"] == modules


def test_an_adapter_of_a_run_without_factors_is_refused(exports, tmp_path):
    export = ["--export", "--adapter", f"--out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="no LoRA factors of the language model"):
        convert.main([*export, f"--checkpoint={exports / 'base'}"])
    with pytest.raises(UserError, match="add llm to connector"):
        convert.main([*export, f"--checkpoint={exports / 'run'}", "--components=connector"])
    assert not (tmp_path / "out").exists()


def test_an_export_with_an_adapter_is_not_read_back_without_its_factors(exports, tmp_path):
    """It would answer by the base, of which its connector knows nothing."""
    for read in (
        lambda: convert.main([f"--import={exports / 'beside'}", f"--out={tmp_path / 'back'}"]),
        lambda: alignvlm_jax.load(exports / "beside"),
    ):
        with pytest.raises(UserError, match="export without --adapter to use it here"):
            read()
    convert.main([f"--import={exports / 'merged'}", f"--out={tmp_path / 'back'}"])
    assert alignvlm_jax.load(tmp_path / "back").loaded.config.lora.rank == 0


def test_an_export_of_a_base_in_bfloat16_computes_what_the_run_does(exports, tmp_path):
    """A base of half the memory must not round the products away that were trained beside it."""
    lora_runs.write(tmp_path / "run", exports / "base", bfloat16_params=("llm/.*",))
    convert.main(["--export", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"])
    convert.main([f"--import={tmp_path / 'out'}", f"--out={tmp_path / 'back'}"])
    tensors = tensors_of(tmp_path / "out" / "llm")
    layer = "model.layers.0"
    assert tensors[f"{layer}.self_attn.q_proj.weight"].dtype == np.float32
    assert tensors[f"{layer}.input_layernorm.weight"].dtype == jnp.bfloat16
    batch = {
        "tokens": np.random.default_rng(1).integers(0, 320, (2, 9)).astype(np.int32),
        "positions": np.tile(np.arange(9, dtype=np.int32), (2, 1)),
        "segment_ids": np.ones((2, 9), np.int32),
    }
    logits = []
    for name in ("run", "back"):
        _, model, params, _ = restore.load_model(tmp_path / name, mesh_lib.single_device())
        logits.append(np.asarray(model.apply({"params": params}, batch).logits))
    np.testing.assert_allclose(*logits, atol=1e-5)
