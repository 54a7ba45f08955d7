"""Points of every kind of perturbation, in the order of their sizes: scores of what was asked
through it; their curves, and the sentence of the report."""

import json

import numpy as np
import pytest

from alignvlm_jax.analysis import base, noise
from alignvlm_jax.errors import UserError
from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import decode, has

SPLIT = "seen_fonts"


def test_noise_on_features(loaded):
    found = noise.measure_features(
        loaded, SPLIT, sigmas=[3.0], relative_sigmas=[0.5], num_pages=3, seed=1
    )
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


def test_the_unperturbed_answers_are_one_file(loaded):
    noise.measure_layout(loaded, SPLIT, [1], [], seed=4)
    path = base.folder(loaded) / "noise" / f"{SPLIT}_sigma_0.jsonl"
    written = path.stat().st_mtime_ns
    assert json.loads(path.read_text().splitlines()[0])["noise"] == {"sigma": 0.0, "seed": 4}
    noise.measure_pixels(loaded, SPLIT, [0.1], num_pages=1, seed=4)
    assert path.stat().st_mtime_ns == written


def test_a_misspelt_split(loaded):
    with pytest.raises(UserError, match="did you mean 'seen_fonts'"):
        noise.measure_features(loaded, "seen_font", [3.0], [], num_pages=1, seed=0)


def of_scores(scores: list[float]) -> dict:
    points = [
        {"relative_sigma": i, "anls": score, "centred_distance": 0.1 * i}
        for i, score in enumerate(scores)
    ]
    return {"centred_between_distance": 0.5, "points": points}


def pixels(results: dict, kind: str = "features") -> np.ndarray:
    return decode(noise.KINDS[kind].curves(results))


def rows(image: np.ndarray, color: str) -> np.ndarray:
    """Where curves of this color are."""
    return np.nonzero(has(image, color).any(1))[0]


def test_curves_are_told_apart_and_follow_the_scores():
    one = pixels({"align": of_scores([0.9, 0.8])})
    both = pixels({"align": of_scores([0.9, 0.8]), "mlp": of_scores([0.9, 0.1])})
    assert one.shape[1] == 2 * noise.INCHES[0] * plotting.DPI
    left, left_of_both = (image[:, : image.shape[1] // 2] for image in (one, both))
    blue, orange = plotting.COLORS[:2]
    assert len(rows(left, blue)) and not len(rows(left, orange))
    # The steeper curve covers more rows.
    assert np.ptp(rows(left_of_both, orange)) > 2 * np.ptp(rows(left, blue))


def test_without_distances_there_is_one_panel():
    points = [{"relative_shift": i, "anls": score} for i, score in enumerate((0.9, 0.1))]
    found = {"kind": "layout", "patch_pixels": 8.0, "points": points}
    image = pixels({"align": found}, "layout")
    assert image.shape[1] == noise.INCHES[0] * plotting.DPI
    assert np.ptp(rows(image, plotting.COLORS[0])) > image.shape[0] / 2


def written(*scores: float) -> dict:
    points = [
        {"relative_sigma": size, "anls": score, "centred_distance": 0.1 * size}
        for size, score in enumerate(scores)
    ]
    return {"points": points, "centred_between_distance": 0.4}


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ((0.8,), "Undisturbed, the answers score ANLS 0.800."),
        # What has recovered after a loss does not count.
        (
            (0.8, 0.73, 0.5, 0.8),
            "at least nine tenths of that are left up to noise of 1 times the features' standard",
        ),
        (
            (0.8, 0.71, 0.5),
            "less than nine tenths of that are left at noise of 1 times the features' standard",
        ),
        (
            (0.8, 0.71, 0.5),
            "ANLS 0.500 at 2, which moves visual tokens by 0.50 of the distance between different "
            "ones.",
        ),
    ],
)
def test_sentence(scores, words):
    assert words in noise.FEATURES.sentence(written(*scores))


def test_of_nothing_no_fraction_is_left():
    text = noise.FEATURES.sentence(written(0.0, 0.0, 0.02))
    assert text.startswith("Undisturbed, the answers score ANLS 0.000, and ANLS 0.020 at 2, which")
    assert "nine tenths" not in text


def test_the_sentence_of_moved_content_has_no_distances():
    points = [{"shift": size, "anls": score} for size, score in ((0, 0.8), (4, 0.75), (8, 0.1))]
    text = noise.KINDS["layout"].sentence({"points": points})
    assert text.endswith("left up to shifts of at most 4 px, and ANLS 0.100 at 8.")
