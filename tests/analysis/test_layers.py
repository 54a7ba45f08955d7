"""The nearest text states as NumPy has them, and what they say where it is known beforehand."""

import dataclasses

import numpy as np
import pytest

from alignvlm_jax.analysis import layers, shown
from alignvlm_jax.analysis import states as states_lib
from alignvlm_jax.data import shards, tiling
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import tiles
from alignvlm_jax.models import vlm
from alignvlm_jax.pictures import plotting
from tests.conftest import random_params, tiny_connector
from tests.pictures.pictures import decode, has

ANALYSIS = layers.Layers()
SPLIT = "seen_fonts"


@pytest.fixture(scope="module")
def loaded(loaded):
    """The model, for which the small print of its pages is large enough to be read."""
    data = dataclasses.replace(
        loaded.config.data, min_contrast=0, min_token_height=0.0, full_cover=0.1
    )
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))


@pytest.fixture(scope="module")
def found(loaded):
    return layers.measure(loaded, SPLIT, 4, 64, seed=0)


def with_connector(loaded, name: str):
    """The model with another connector, whose weights are random."""
    model = dataclasses.replace(loaded.config.model, connector=tiny_connector(name))
    config = dataclasses.replace(loaded.config, model=model)
    batch = vlm.abstract_batch(model, config.data, 1)
    params = random_params(vlm.VLM(model), batch)
    return dataclasses.replace(loaded, config=config, model=vlm.VLM(model), params=params)


def test_nearest_is_that_of_all_pairs(monkeypatch):
    monkeypatch.setattr(layers, "PIECE", 40)  # Queries in pieces of three.
    rng = np.random.default_rng(0)
    queries, *banks = (
        layers._units(np.float32(rng.normal(2, 1, (1, count, 5))), is_centred=False)[0]
        for count in (10, 13, 13)
    )
    best = layers.nearest(queries, np.stack(banks))
    for number, bank in enumerate(banks):
        cosines = np.float64(queries) @ np.float64(bank).T
        assert best.indices[number].tolist() == cosines.argmax(1).tolist()
        np.testing.assert_allclose(best.cosines[number], cosines.max(1), atol=1e-6)


def test_every_layer_has_all_visual_tokens(found, loaded):
    depth = loaded.config.model.llm.num_layers + 1
    for form in layers.FORMS:
        histogram = np.array(found[form]["histogram"])
        assert histogram.shape == (depth, depth)
        np.testing.assert_allclose(histogram.sum(1), 1, atol=1e-4)
        for layer, row in enumerate(found[form]["layers"]):
            assert row["nearest"] == histogram[layer].argmax()
            assert row["fraction"] == pytest.approx(histogram[layer].max(), abs=1e-5)
            assert set(row["shown"]) == set(layers.BANKS) == set(row["shuffled"])
    assert 0 < found["num_labelled"] < found["num_visual"] == 64


def test_where_blank_patches_have_no_tokens_states_are_of_those_that_stay(loaded):
    """At the input a visual token is the same, whichever others are there; and it has the number
    that its patch has among all."""
    pages = layers.base.pages(loaded, SPLIT, 4)
    vision = loaded.config.model.vision
    # Half of the patches as blank ones, whatever the pages of the fixture are.
    half = np.median(tiling.contrast(tiles.tiles_of(loaded, pages), vision))
    data = dataclasses.replace(loaded.config.data, blank_contrast=int(half))
    config = dataclasses.replace(loaded.config, data=data)
    without = dataclasses.replace(loaded, config=config)
    everything, all_numbers = states_lib.of_pages(loaded, pages, 10**6, np.random.default_rng(0))
    states, numbers = states_lib.of_pages(without, pages, 10**6, np.random.default_rng(0))
    assert all_numbers.tolist() == list(range(everything.shape[1]))
    assert 0.2 < len(numbers) / len(all_numbers) < 0.95
    np.testing.assert_allclose(states[0], everything[0][numbers], atol=1e-6)
    assert layers.measure(without, SPLIT, 4, 64, seed=0)["num_labelled"] > 0


def test_text_in_the_place_of_pages_belongs_to_its_own_layer(loaded, monkeypatch):
    """Visual tokens that are the text's own states lie at their own layer, and show their own
    tokens."""
    pages = layers.base.pages(loaded, SPLIT, 5)
    states, tokens = states_lib.of_text(loaded, pages, SPLIT, 64, np.random.default_rng(0))
    everything = np.arange(states.shape[1])
    monkeypatch.setattr(states_lib, "of_text", lambda *_: (states, tokens))
    monkeypatch.setattr(states_lib, "of_pages", lambda *_: (states, everything))
    of_text = shown.Shown(tokens[:, None], np.ones((len(tokens), 1)))
    monkeypatch.setattr(shown, "of_patches", lambda *_: of_text)
    found = layers.measure(loaded, SPLIT, 5, 64, seed=0)
    for form in layers.FORMS:
        assert found[form]["histogram"] == np.eye(len(states)).tolist()
        for row in found[form]["layers"]:
            assert row["cosine"] == pytest.approx(1, abs=1e-5)
            assert row["shown"]["own"] == row["shown"]["any"] == 1
            assert row["shuffled"]["own"] < 0.7
    assert found["cosine"]["layers"][0]["shown"]["input"] == 1


def test_bounds_hold_and_the_choice_is_the_seeds(loaded):
    once, again, other = (
        states_lib.of_pages(loaded, layers.base.pages(loaded, SPLIT, 5), 7, rng)
        for rng in map(np.random.default_rng, (0, 0, 1))
    )
    assert once[0].shape[1] == len(once[1]) == 7
    np.testing.assert_array_equal(once[0], again[0])
    assert once[1].tolist() == again[1].tolist() != other[1].tolist()


def test_states_are_those_of_the_visual_tokens_that_are_named(loaded):
    """At the input they are what the connector made."""
    pages = layers.base.pages(loaded, SPLIT, 5)
    states, chosen = states_lib.of_pages(loaded, pages, 20, np.random.default_rng(0))
    none = layers.displacement.Perturbation(0, seed=0)
    tokens = layers.displacement.visual_tokens(loaded, pages, none)
    np.testing.assert_allclose(states[0], tokens[chosen], atol=1e-5)
    assert len(shown.of_patches(loaded, pages).tokens) == len(tokens)


def test_without_a_token_a_patch_the_labels_are_left_out(loaded, capsys):
    found = layers.measure(with_connector(loaded, "perceiver"), SPLIT, 4, 64, seed=0)
    assert not found["has_labels"] and found["num_labelled"] == 0
    assert all(set(row) == {"nearest", "fraction", "cosine"} for row in found["cosine"]["layers"])
    from rich.console import Console

    ANALYSIS.show(Console(width=120), found)
    assert "no token for each patch" in capsys.readouterr().out
    assert ANALYSIS.sentence(found).endswith(").")
    assert decode(ANALYSIS.picture("perceiver", found)).ndim == 3


@pytest.mark.parametrize("name", ["mlp", "ovis"])
def test_with_a_token_a_patch_there_are_labels(loaded, name):
    found = layers.measure(with_connector(loaded, name), SPLIT, 4, 64, seed=0)
    assert found["has_labels"] and found["num_labelled"]


def test_pages_that_do_not_know_their_words_are_refused(loaded, monkeypatch):
    pages = [dataclasses.replace(page, lines=()) for page in layers.base.pages(loaded, SPLIT, 3)]
    monkeypatch.setattr(layers.base, "pages", lambda *_: pages)
    with pytest.raises(UserError, match="none of 3 pages knows its words"):
        layers.measure(loaded, SPLIT, 3, 64, seed=0)


def test_what_patches_show(loaded):
    """A word of three digits over the two patches at the top left, the rest of the page blank."""
    source = shards.RecordSource(loaded.config.data.dir, SPLIT)
    [word] = source[0].lines[0][0]
    tokens = shown.of_patches(loaded, [source[0]]).tokens
    visible = [set(row[row != shown.NONE].tolist()) for row in tokens]
    first, second, *others = loaded.tokenizer.encode(word.text)
    assert {first, second} <= visible[0] and set(others) <= set.union(*visible)
    assert sum(map(bool, visible)) < len(visible)


def test_tokens_of_the_same_characters_have_one_number():
    class Pieces:
        def piece(self, token: int) -> str:
            return ["a", "␣a", "A", "␣", "␣␣", "ab␣"][token]

    numbers = shown.characters(Pieces(), np.array([[1, 0, shown.NONE], [2, 3, 4]])).tolist()
    assert numbers[0][0] == numbers[0][1] and numbers[0][2] == shown.NONE
    assert len({*numbers[0][:2], *numbers[1]}) == 4


def test_the_picture_has_a_curve_only_where_tokens_are_known(found):
    image = decode(ANALYSIS.picture("align", found))
    right = image[:, image.shape[1] * 2 // 3 :]
    assert has(right, plotting.COLORS[1]).any()
    bare = decode(ANALYSIS.picture("align", found | {"num_labelled": 0}))
    assert not has(bare, plotting.COLORS[1]).any()


def test_sentence(found):
    text = ANALYSIS.sentence(found)
    first = found["cosine"]["layers"][0]
    assert f"are nearest to text states of layer {first['nearest']}" in text
    assert f"{100 * first['shuffled']['own']:.0f} % if patches are shuffled." in text
