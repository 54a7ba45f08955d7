"""What is refused of the folders that people have, and by which message; and that all others are
read. `make test-parity` compares these with transformers."""

import json

import jax
import numpy as np
import pytest

from alignvlm_jax import presets
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import towers
from alignvlm_jax.weights.families import siglip
from alignvlm_jax.weights.families.base import Fields
from tests.weights import variations
from tests.weights.apply import read_llm, run_vision


def open_and_read(case: variations.Case, part: str, folder) -> None:
    """Opens a tower and reads it, as `convert` does."""
    if part == "llm":
        read_llm(towers.open_llm(str(folder)))
        return
    tower = towers.open_vision(str(folder), case.tile_size)
    config = tower.config
    run_vision(tower, np.zeros((1, config.tile_height, config.tile_width, 3), np.uint8))


REFUSED = {
    (part, name): case
    for part, cases in (("llm", variations.LLMS), ("vision", variations.VISION))
    for name, case in cases.items()
    if case.refused
}


@pytest.mark.parametrize(("part", "name"), REFUSED, ids=map(str, REFUSED))
def test_what_is_refused(tmp_path, part, name):
    case = REFUSED[part, name]
    with pytest.raises(UserError, match=case.refused) as error:
        open_and_read(case, part, case.write(tmp_path))
    assert "\n" not in str(error.value)


def test_there_are_enough():
    assert len(variations.LLMS) + len(variations.VISION) >= 120


def test_siglip_base_as_it_is_published(tmp_path):
    """All that google/siglip-base-patch16-224 says of its encoder is its type."""
    fields = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    assert siglip.Siglip().read(Fields(path), None) == presets.VISION["siglip_b16_224"]


def test_a_head_of_its_own_is_told(tmp_path):
    folder = variations.LLMS["tied, another head"].write(tmp_path)
    tower = towers.open_llm(str(folder))
    assert not tower.config.tie_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight by up to" in tower.note


def test_what_transformers_saves_of_a_gguf_is_plain(tmp_path):
    """It holds floats, though config.json still names the method."""
    plain = variations.LLMS["plain untied"].write(tmp_path / "plain")
    group = {"dequantize": False, "gguf_file": "model.Q4_1.gguf", "quant_method": "gguf"}
    saved = variations.llm(config={"quantization_config": group}).write(tmp_path / "saved")
    expected, found = (read_llm(towers.open_llm(str(folder))) for folder in (plain, saved))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "google/siglip2-base-patch16-224"])
def test_a_name_of_the_hub_is_no_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"does not exist here.*: hf download {name} --local-dir=\w"
    ):
        towers.open_llm(name)
