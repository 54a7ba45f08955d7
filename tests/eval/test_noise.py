"""Noise: none at sigma 0, the asked size at others, and distances as NumPy has them, pair by pair."""

import dataclasses
import itertools

import numpy as np
import pytest

from alignvlm_jax.data import sources
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import analysis, loading, noise, runner
from alignvlm_jax.eval.noise import Noise

SPLIT = "seen_fonts"


@pytest.fixture(scope="module")
def loaded(trained_workdir, tmp_path_factory):
    """The model, its results in a folder of their own."""
    loaded = loading.load(trained_workdir, loading.load_config(trained_workdir))
    path = tmp_path_factory.mktemp("noise") / "checkpoints" / "7"
    path.mkdir(parents=True)
    return dataclasses.replace(loaded, path=path)


@pytest.fixture(scope="module")
def tiles(loaded):
    records = sources.RecordSource(loaded.config.data.dir, SPLIT)
    return analysis.tiles_of(loaded, [records[i] for i in range(3)])


def cosine_distance(a, b) -> float:
    a, b = np.float64(a), np.float64(b)
    return 1 - a @ b / np.sqrt((a @ a) * (b @ b))


def test_distances(loaded):
    a, b = np.random.default_rng(0).normal(1, 1, (2, 7, 5))
    np.testing.assert_allclose(
        noise.cosine_distances(a, b), [cosine_distance(*pair) for pair in zip(a, b, strict=True)]
    )
    pairs = [cosine_distance(x, y) for x, y in itertools.permutations(a, 2)]
    assert noise.between_distance(a) == pytest.approx(np.mean(pairs))
    assert noise.between_distance(a[:1]) == 0
    assert noise.cosine_distances(a * 0, b).tolist() == [1] * 7


def test_what_all_patches_share_is_no_signal():
    features = np.random.default_rng(0).normal(0, 2, (10_000, 8)) + 100 * np.arange(8)
    assert noise.signal_std(features) == pytest.approx(2, rel=0.02)


def test_noise_has_the_asked_size_and_is_another_for_every_row(loaded, tiles):
    def through(sigma: float, seed: int = 0) -> np.ndarray:
        rows = [Noise(sigma, seed).fields(str(i)) for i in range(len(tiles))]
        fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return np.concatenate(list(analysis.map_tiles(loaded, noise._features, {"tiles": tiles} | fields)))

    clean = np.concatenate(list(analysis.map_tiles(loaded, noise._features, {"tiles": tiles})))
    assert clean.shape == (len(tiles), 1, 8, 16)
    np.testing.assert_allclose(through(1e-30), clean, atol=1e-6)
    added = through(3.0) - clean
    assert added.std() == pytest.approx(3, rel=0.15)
    assert added.mean() == pytest.approx(0, abs=0.5)
    np.testing.assert_allclose(through(6.0) - clean, 2 * added, atol=1e-4)
    assert np.abs(added[0] - added[1]).max() > 1
    assert np.abs(added - (through(3.0, seed=1) - clean)).max() > 1


def test_sigma_0_is_the_model_as_it_is(loaded):
    asker = runner.Runner(loaded, loaded.config)
    clean = asker.evaluate(SPLIT, blind=False)
    asked = noise.ask(asker, loaded, SPLIT, Noise(0.0, seed=0))
    assert asked.rows == clean.rows
    assert not Noise(0.0, seed=0).fields("any")
    assert asked.header["noise"] == {"sigma": 0.0, "seed": 0}
    # It is not taken for an evaluation of the checkpoint, and large noise is seen.
    assert asker.evaluate(SPLIT, blind=False) == clean
    loud = noise.ask(asker, loaded, SPLIT, Noise(100.0, seed=0))
    assert [row["prediction"] for row in loud.rows] != [row["prediction"] for row in clean.rows]


def test_points(loaded, tiles):
    found = noise.measure(loaded, SPLIT, sigmas=[3.0], relative_sigmas=[0.5], num_pages=3, seed=1)
    points = found["points"]
    clean = points[0]
    assert (clean["sigma"], clean["relative_sigma"], clean["num_eval"]) == (0, 0, 6)
    assert clean["distance"] == pytest.approx(0, abs=1e-12)
    assert {0.5 * found["feature_std"], 3.0} == {point["sigma"] for point in points[1:]}
    assert all(p["relative_sigma"] == pytest.approx(p["sigma"] / found["feature_std"]) for p in points)
    assert points[0]["distance"] < points[1]["distance"] < points[2]["distance"]

    before, after = (noise.visual_tokens(loaded, tiles, Noise(sigma, 1)) for sigma in (0.0, 3.0))
    last = next(point for point in points if point["sigma"] == 3.0)
    assert last["distance"] == pytest.approx(
        np.mean([cosine_distance(*pair) for pair in zip(before, after, strict=True)])
    )
    mean = before.mean(0)
    centred = [cosine_distance(x - mean, y - mean) for x, y in zip(before, after, strict=True)]
    assert last["centred_distance"] == pytest.approx(np.mean(centred))
    pairs = [cosine_distance(x - mean, y - mean) for x, y in itertools.permutations(before, 2)]
    assert found["centred_between_distance"] == pytest.approx(np.mean(pairs))


def test_a_misspelt_split(loaded):
    with pytest.raises(UserError, match="did you mean 'seen_fonts'"):
        noise.measure(loaded, "seen_font", [3.0], [], num_pages=1, seed=0)
