"""Imported towers against what PyTorch's implementations computed (tests/golden/make_goldens.py),
in float32."""

import pathlib

import numpy as np
import pytest

from alignvlm_jax.weights import towers
from tests.weights import folders
from tests.weights.apply import run_llm, run_vision, without_scaling

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TOLERANCE = 2e-4


def difference(ours: np.ndarray, golden: np.ndarray) -> float:
    assert ours.shape == golden.shape and golden.std() > 0.3
    return np.abs(ours - golden).max()


@pytest.mark.parametrize("number, variant", list(enumerate(folders.LLAMAS)))
def test_llama(tmp_path, number, variant):
    golden = np.load(GOLDEN / f"llama_{number}.npz")
    # In three shards: how a model is cut up must not matter.
    tower = towers.open_llm(str(folders.write_llama(tmp_path / "llm", variant, num_shards=3)))
    assert difference(run_llm(tower, golden["tokens"]), golden["logits"]) <= TOLERANCE
    if "scaled" in variant:
        assert (
            difference(run_llm(without_scaling(tower), golden["tokens"]), golden["logits"])
            > 100 * TOLERANCE
        )


@pytest.mark.parametrize("number, variant", list(enumerate(folders.QWENS)))
def test_qwen(tmp_path, number, variant):
    golden = np.load(GOLDEN / f"qwen_{number}.npz")
    tower = towers.open_llm(str(folders.write_llama(tmp_path / "llm", variant, num_shards=3)))
    assert difference(run_llm(tower, golden["tokens"]), golden["logits"]) <= TOLERANCE


@pytest.mark.parametrize("number, variant", list(enumerate(folders.OTHERS)))
def test_other_families_and_scalings(tmp_path, number, variant):
    golden = np.load(GOLDEN / f"other_{number}.npz")
    tower = towers.open_llm(str(folders.write_llama(tmp_path / "llm", variant, num_shards=2)))
    assert difference(run_llm(tower, golden["tokens"]), golden["logits"]) <= TOLERANCE
    if tower.config.rope_scaling.factor != 1:
        unscaled = run_llm(without_scaling(tower), golden["tokens"])
        assert difference(unscaled, golden["logits"]) > 100 * TOLERANCE


@pytest.mark.parametrize("size", [18, 36])
def test_naflex_at_another_resolution(tmp_path, size):
    golden = np.load(GOLDEN / f"siglip2_naflex_{size}.npz")
    folder = folders.write_siglip(tmp_path / "vision", is_naflex=True)
    tower = towers.open_vision(str(folder), size)
    assert difference(run_vision(tower, golden["pixels"]), golden["hidden"]) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [("siglip", {}), ("siglip2_naflex", {"is_naflex": True})],
)
def test_siglip(tmp_path, name, options):
    golden = np.load(GOLDEN / f"{name}.npz")
    tower = towers.open_vision(str(folders.write_siglip(tmp_path / "vision", **options)))
    assert difference(run_vision(tower, golden["pixels"]), golden["hidden"]) <= TOLERANCE


def test_the_encoder_inside_a_siglip_model(tmp_path):
    """Its vision weights are others than those of the encoder alone: the text tower's names are
    drawn before them."""
    whole = towers.open_vision(str(folders.write_siglip(tmp_path / "whole", is_whole=True)))
    pixels = np.load(GOLDEN / "siglip.npz")["pixels"]
    assert np.isfinite(run_vision(whole, pixels)).all()


@pytest.mark.parametrize("size", [24, 36])
def test_dinov2_without_its_class_token(tmp_path, size):
    """At the resolution of its position table and at another."""
    golden = np.load(GOLDEN / f"dinov2_{size}.npz")
    tower = towers.open_vision(str(folders.write_dinov2(tmp_path / "vision")), size)
    assert difference(run_vision(tower, golden["pixels"]), golden["hidden"]) <= TOLERANCE
