"""Our encoder against big_vision's own ViT, on the same parameters, where a checkout of it can be
imported."""

import importlib
import importlib.util
import os
import sys
import types

import jax
import numpy as np
import pytest
from flax import traverse_util

from alignvlm_jax.weights import towers
from tests.weights.apply import normalised, run_vision

WHY = "big_vision, or what it imports, is not importable; `make test-big-vision` clones it"


@pytest.fixture
def vit(monkeypatch):
    """The module of big_vision's ViT, without TensorFlow: its utils import files of that, and none
    is opened here."""
    if importlib.util.find_spec("tensorflow") is None:
        # After flax has looked for TensorFlow itself.
        importlib.import_module("flax.io")
        for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["tensorflow"].io = sys.modules["tensorflow.io"]
        sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]
    if os.environ.get("BIG_VISION"):
        # `make test-big-vision` must not pass for want of it.
        return importlib.import_module("big_vision.models.vit")
    return pytest.importorskip("big_vision.models.vit", reason=WHY, exc_type=ImportError)


@pytest.mark.parametrize("is_scanned", [True, False])
def test_equals_big_vision(vit, tmp_path, is_scanned):
    model = vit.Model(
        patch_size=(6, 6), width=24, depth=3, mlp_dim=40, num_heads=3, scan=is_scanned
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    images = np.zeros((2, 24, 24, 3), np.float32)
    params = model.init(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(1)
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = {
        name: np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
        for name, x in flat.items()
    }
    np.savez(tmp_path / "vit.npz", **{f"params/img/{name}": x for name, x in flat.items()})
    tower = towers.open_vision(str(tmp_path / "vit.npz"))
    images = normalised(tower, pixels).transpose(0, 2, 3, 1)
    _, out = model.apply({"params": traverse_util.unflatten_dict(flat, sep="/")}, images)
    np.testing.assert_allclose(run_vision(tower, pixels), out["encoded"], atol=2e-4)
