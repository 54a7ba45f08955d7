"""Points of every kind of disturbance: scores of what was asked through it, in the order of their
sizes."""

import dataclasses
import json

import pytest

from alignvlm_jax.analysis import base, noise
from alignvlm_jax.analysis.perturbation import FeatureNoise, PixelNoise, Shift
from alignvlm_jax.benchmarks import runner
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import loading

SPLIT = "seen_fonts"


@pytest.fixture(scope="module")
def loaded(trained_workdir, tmp_path_factory):
    """The model, its results in a folder of their own."""
    loaded = loading.load(trained_workdir, loading.load_config(trained_workdir))
    path = tmp_path_factory.mktemp("noise") / "checkpoints" / "7"
    path.mkdir(parents=True)
    return dataclasses.replace(loaded, path=path)


def test_sigma_0_is_the_model_as_it_is(loaded):
    evaluator = runner.Runner(loaded)
    clean = evaluator.evaluate(SPLIT, blind=False)
    asked = noise.ask(evaluator, loaded, SPLIT, FeatureNoise(0.0, seed=0))
    assert asked.rows == clean.rows
    assert asked.header["noise"] == {"sigma": 0.0, "seed": 0}
    # It is not taken for an evaluation of the checkpoint, and whatever is large is seen.
    assert evaluator.evaluate(SPLIT, blind=False) == clean
    for loud in (FeatureNoise(100.0, 0), PixelNoise(1.0, 0), Shift(8, 0)):
        said = noise.ask(evaluator, loaded, SPLIT, loud).rows
        assert [row["prediction"] for row in said] != [row["prediction"] for row in clean.rows]


def test_noise_on_features(loaded):
    found = noise.measure(loaded, SPLIT, sigmas=[3.0], relative_sigmas=[0.5], num_pages=3, seed=1)
    points = found["points"]
    clean = points[0]
    assert (clean["sigma"], clean["relative_sigma"], clean["num_eval"]) == (0, 0, 6)
    assert clean["distance"] == pytest.approx(0, abs=1e-12)
    assert {0.5 * found["feature_std"], 3.0} == {point["sigma"] for point in points[1:]}
    assert all(
        p["relative_sigma"] == pytest.approx(p["sigma"] / found["feature_std"]) for p in points
    )
    assert points[0]["distance"] < points[1]["distance"] < points[2]["distance"]
    assert found["num_pages"] == 3


def test_noise_on_pixels(loaded):
    found = noise.measure_pixels(loaded, SPLIT, sigmas=[0.2, 0.1], num_pages=3, seed=1)
    assert found["kind"] == "pixels"
    assert [point["sigma"] for point in found["points"]] == [0, 0.1, 0.2]
    distances = [point["centred_distance"] for point in found["points"]]
    assert distances[0] == pytest.approx(0, abs=1e-12)
    assert distances[0] < distances[1] < distances[2]
    assert all(point["num_eval"] == 6 for point in found["points"])


def test_moved_content(loaded):
    found = noise.measure_layout(loaded, SPLIT, shifts=[5], relative_shifts=[0.01, 0.5, 1], seed=1)
    assert [point["shift"] for point in found["points"]] == [0, 1, 2, 4, 5]
    assert [point["relative_shift"] for point in found["points"]] == [0, 0.25, 0.5, 1, 1.25]
    # Of a patch that shows something else there is no distance.
    assert not [name for name in (*found, *found["points"][1]) if "distance" in name]
    folder = base.folder(loaded) / "noise"
    assert all((folder / f"{SPLIT}_layout_shift_{shift}.jsonl").exists() for shift in (1, 2, 4, 5))


def test_patches_on_the_page(loaded):
    """Pages of 16 x 16 pixels make two tiles of 8 x 16, or, halved, one."""
    pages = noise.pages_asked_about(loaded, SPLIT)
    assert noise.patch_side(loaded, pages) == 4
    data = dataclasses.replace(loaded.config.data, max_tiles=1)
    one_tile = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))
    assert noise.patch_side(one_tile, pages) == 8
    with pytest.raises(UserError, match="no images"):
        noise.patch_side(loaded, [dataclasses.replace(pages[0], images=())])


def test_the_undisturbed_answers_are_one_file(loaded):
    noise.measure_layout(loaded, SPLIT, [1], [], seed=4)
    path = base.folder(loaded) / "noise" / f"{SPLIT}_sigma_0.jsonl"
    written = path.stat().st_mtime_ns
    assert json.loads(path.read_text().splitlines()[0])["noise"] == {"sigma": 0.0, "seed": 4}
    noise.measure_pixels(loaded, SPLIT, [0.1], num_pages=1, seed=4)
    assert path.stat().st_mtime_ns == written


def test_a_misspelt_split(loaded):
    with pytest.raises(UserError, match="did you mean 'seen_fonts'"):
        noise.measure(loaded, "seen_font", [3.0], [], num_pages=1, seed=0)
