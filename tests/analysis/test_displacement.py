"""Distances as NumPy has them, pair by pair, and noise of the asked size."""

import itertools

import numpy as np
import pytest

from alignvlm_jax.analysis import displacement
from alignvlm_jax.analysis.perturbation import FeatureNoise, PixelNoise
from alignvlm_jax.data import shards
from alignvlm_jax.inference import loading
from alignvlm_jax.inference import tiles as tiles_lib

SPLIT = "seen_fonts"


@pytest.fixture(scope="module")
def loaded(trained_workdir):
    return loading.load(trained_workdir, loading.load_config(trained_workdir))


@pytest.fixture(scope="module")
def pages(loaded):
    records = shards.RecordSource(loaded.config.data.dir, SPLIT)
    return [records[i] for i in range(3)]


def cosine_distance(a, b) -> float:
    a = np.float64(a)
    b = np.float64(b)
    return 1 - a @ b / np.sqrt((a @ a) * (b @ b))


def test_distances():
    a, b = np.random.default_rng(0).normal(1, 1, (2, 7, 5))
    np.testing.assert_allclose(
        displacement.cosine_distances(a, b),
        [cosine_distance(*pair) for pair in zip(a, b, strict=True)],
    )
    pairs = [cosine_distance(x, y) for x, y in itertools.permutations(a, 2)]
    assert displacement.between_distance(a) == pytest.approx(np.mean(pairs))
    assert displacement.between_distance(a[:1]) == 0
    assert displacement.cosine_distances(a * 0, b).tolist() == [1] * 7


def test_what_all_patches_share_is_no_signal():
    features = np.random.default_rng(0).normal(0, 2, (10_000, 8)) + 100 * np.arange(8)
    assert displacement.signal_std(features) == pytest.approx(2, rel=0.02)


def test_noise_has_the_asked_size_and_is_another_for_every_row(loaded, pages):
    tiles = tiles_lib.tiles_of(loaded, pages)

    def through(sigma: float, seed: int = 0) -> np.ndarray:
        rows = [FeatureNoise(sigma, seed).inputs(str(i)) for i in range(len(tiles))]
        fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return np.concatenate(
            list(tiles_lib.map_tiles(loaded, displacement._features, {"tiles": tiles} | fields))
        )

    clean = np.concatenate(
        list(tiles_lib.map_tiles(loaded, displacement._features, {"tiles": tiles}))
    )
    assert clean.shape == (len(tiles), 1, 8, 16)
    assert displacement.feature_std(loaded, pages) == pytest.approx(
        displacement.signal_std(clean.reshape(-1, 16))
    )
    np.testing.assert_allclose(through(1e-30), clean, atol=1e-6)
    added = through(3.0) - clean
    assert added.std() == pytest.approx(3, rel=0.15)
    assert added.mean() == pytest.approx(0, abs=0.5)
    np.testing.assert_allclose(through(6.0) - clean, 2 * added, atol=1e-4)
    assert np.abs(added[0] - added[1]).max() > 1
    assert np.abs(added - (through(3.0, seed=1) - clean)).max() > 1


@pytest.mark.parametrize("noise", [FeatureNoise(3.0, 1), PixelNoise(0.1, 1)])
def test_displacement_is_that_of_the_visual_tokens(loaded, pages, noise):
    between, (still, moved) = displacement.measure(loaded, pages, [type(noise)(0.0, 1), noise])
    assert still["distance"] == pytest.approx(0, abs=1e-12)
    before, after = (
        displacement.visual_tokens(loaded, pages, one) for one in (FeatureNoise(0.0, 1), noise)
    )
    mean = before.mean(0)
    pairs = list(zip(before, after, strict=True))
    assert moved["distance"] == pytest.approx(np.mean([cosine_distance(x, y) for x, y in pairs]))
    assert moved["centred_distance"] == pytest.approx(
        np.mean([cosine_distance(x - mean, y - mean) for x, y in pairs])
    )
    different = [cosine_distance(x - mean, y - mean) for x, y in itertools.permutations(before, 2)]
    assert between["centred_between_distance"] == pytest.approx(np.mean(different))
    assert moved["distance"] > 1e-3
