"""Folders as people have them: ours refuses them by name, or equals transformers on the same
files."""

import json

import numpy as np
import pytest
import torch
import transformers

from alignvlm_jax.weights import towers
from tests.parity import reference
from tests.parity.table import record
from tests.weights import folders, variations
from tests.weights.apply import run_llm, run_vision

TOLERANCE = 2e-4
LLMS = [name for name, case in variations.LLMS.items() if not case.refused]
VISION = [name for name, case in variations.VISION.items() if not case.refused]


@pytest.mark.parametrize("name", LLMS)
def test_language_models(tmp_path, name):
    folder = variations.LLMS[name].write(tmp_path)
    tokens = np.random.default_rng(9).integers(0, folders.LLAMA["vocab_size"], (2, 48))
    ours = run_llm(towers.open_llm(str(folder)), tokens)
    record("folders", name, ours, reference.llm_logits(folder, tokens), TOLERANCE)


@pytest.mark.parametrize("name", VISION)
def test_encoders(tmp_path, name):
    case = variations.VISION[name]
    folder = case.write(tmp_path)
    tower = towers.open_vision(str(folder), case.tile_size)
    size = tower.config.tile_height
    pixels = np.random.default_rng(9).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    record("folders", name, run_vision(tower, pixels), features(folder, pixels), TOLERANCE)


@torch.no_grad()
def features(folder, pixels: np.ndarray) -> np.ndarray:
    """Last hidden states [B, P, E] of pixels [B, Y, X, 3] that the folder's own image processor
    normalises."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    scaled = torch.tensor(processed(folder, pixels, kind))
    if kind == "dinov2":
        model = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
        return reference.without_class_token(model, scaled)
    if kind.startswith("siglip2"):
        model = transformers.Siglip2VisionModel.from_pretrained(folder, dtype=torch.float32).eval()
        return reference.naflex_features(model, scaled)
    model = transformers.SiglipVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    resampled = scaled.shape[2] // config.patch_size != config.image_size // config.patch_size
    return model(scaled, interpolate_pos_encoding=resampled).last_hidden_state.numpy()


def processed(folder, pixels: np.ndarray, kind: str) -> np.ndarray:
    """Pixels [B, 3, Y, X] as the image processor of a folder makes them, but for their size."""
    if kind == "dinov2" and not list(folder.glob("*processor_config.json")):
        return reference.scaled(pixels, reference.DINOV2_MEAN, reference.DINOV2_STD)
    processor = transformers.SiglipImageProcessor()
    if list(folder.glob("*processor_config.json")):
        processor = transformers.SiglipImageProcessor.from_pretrained(folder)
    images = [image.transpose(2, 0, 1) for image in pixels]
    made = processor(images, do_resize=False, input_data_format="channels_first")
    return np.stack([np.asarray(image, np.float32) for image in made["pixel_values"]])
