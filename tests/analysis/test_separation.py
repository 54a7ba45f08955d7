"""Distances between visual tokens of letters as NumPy has them pair by pair, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest

from alignvlm_jax import __main__ as main
from alignvlm_jax.analysis import separation, shown
from alignvlm_jax.errors import UserError
from alignvlm_jax.pictures import plotting
from tests.conftest import tiny_connector
from tests.pictures.pictures import decode, has

ANALYSIS = separation.Separation()
SPLIT = "seen_fonts"


def letters(monkeypatch, tokens: np.ndarray, weights: np.ndarray) -> None:
    """Makes the patches of whatever pages show these tokens."""
    found = shown.Shown(tokens[:, None], weights[:, None])
    monkeypatch.setattr(shown, "of_patches", lambda *_: found)


def test_cosines_are_means_over_pairs():
    vectors = np.random.default_rng(0).normal(1, 1, (9, 4))
    classes = np.array([0, 1, 0, 2, 2, 1, 0, 2, 0])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = {True: [], False: []}
    for i, j in itertools.permutations(range(9), 2):
        pairs[bool(classes[i] == classes[j])].append(units[i] @ units[j])
    expected = np.mean(pairs[True]), np.mean(pairs[False])
    np.testing.assert_allclose(separation.cosines(vectors, classes), expected)


def test_margins_leave_a_vector_out_of_its_own_mean():
    rng = np.random.default_rng(0)
    clean = rng.normal(0, 1, (8, 3))
    noisy = clean + rng.normal(0, 1, (8, 3))
    classes = np.array([0, 1, 0, 1, 2, 2, 0, 2])
    found = separation.margins(noisy, clean, classes)
    for i, vector in enumerate(noisy):
        rest = (classes == classes[i]) & (np.arange(8) != i)
        assert found.own[i] == pytest.approx(np.linalg.norm(vector - clean[rest].mean(0)))
        others = [clean[classes == c].mean(0) for c in set(classes.tolist()) - {classes[i]}]
        nearest = min(np.linalg.norm(vector - mean) for mean in others)
        assert found.other[i] == pytest.approx(nearest)


def test_letters_that_stand_apart_have_a_margin_and_lose_it_to_noise(loaded, monkeypatch):
    """Two letters at opposite places; noise of their distance takes some to the other's."""
    rng = np.random.default_rng(0)
    tokens = np.repeat([8, 9], 50)
    place = np.where(tokens == 8, 1.0, -1.0)[:, None] * np.eye(6)[0]
    clean = 5 + place + 0.1 * rng.normal(size=(100, 6))
    noisy = clean + rng.normal(size=(100, 6))
    letters(monkeypatch, tokens, np.ones(100))
    of_noise = {False: clean, True: noisy}
    monkeypatch.setattr(
        separation.displacement, "visual_tokens", lambda *args: of_noise[args[-1].size > 0]
    )
    found = separation.measure(loaded, SPLIT, 4, seed=0)
    assert (found["num_patches"], found["num_letters"]) == (100, 2)
    assert found["cosine_different"] > 0.9, "the mean that all have in common"
    assert found["centred_equal"] > 0.9 > -0.9 > found["centred_different"]
    assert found["clean"]["own"] == 1 > found["noisy"]["own"] > 0.5
    # The means lie 2 apart, and a letter scatters by 0.1 in each of 6 channels.
    assert found["clean"]["margin"] == pytest.approx((2 - 0.25) / 0.245, rel=0.1)
    for name in separation.NOISES:
        assert sum(found[name]["patches"]) == 100


def test_patches_that_no_token_fills_are_left_out(loaded, monkeypatch):
    number = len(shown.of_patches(loaded, separation.base.pages(loaded, SPLIT, 4)).tokens)
    tokens = np.resize([8, 9, shown.NONE, 10], number)
    weights = np.where(tokens == 10, 0.4, 0.6)
    letters(monkeypatch, tokens, weights)
    found = separation.measure(loaded, SPLIT, 4, seed=0)
    assert found["num_letters"] == 2
    assert found["num_patches"] == np.isin(tokens, (8, 9)).sum()
    letters(monkeypatch, tokens, np.where(tokens == 8, 1.0, 0.1))
    with pytest.raises(
        UserError, match=f"of {number} patches {number // 4} are filled by a token that"
    ):
        separation.measure(loaded, SPLIT, 4, seed=0)


def test_a_connector_without_a_token_a_patch_is_refused(loaded):
    model = dataclasses.replace(loaded.config.model, connector=tiny_connector("perceiver"))
    with pytest.raises(UserError, match=r"'perceiver' makes 5 tokens of a tile's 8 patches"):
        shown.check(model)
    shown.check(loaded.config.model)
    assert ANALYSIS.needs_token_per_patch


def test_both_analyses_stand_in_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main(["inspect", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "visual tokens of different letters" in printed and "text states lie" in printed


def test_picture_and_sentence():
    one = {"margin": 0.5, "own": 0.75, "patches": [1, 3, 4]}
    found = {"num_patches": 8, "edges": [-1.0, 0.0, 1.0, 2.0], "clean": one}
    found["noisy"] = one | {"own": 0.5, "patches": [4, 3, 1]}
    image = decode(ANALYSIS.picture("align", found))
    assert has(image, plotting.COLORS[0]).any() or image.size
    text = ANALYSIS.sentence(found)
    assert "Of 8 patches that show a letter 75 % have" in text and text.endswith("features 50 %.")
