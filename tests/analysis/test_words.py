"""The few words that each patch keeps, their probability, and how what they leave of the answers is
measured and shown."""

import argparse
import copy
import dataclasses
import types

import numpy as np
import pytest

from alignvlm_jax.analysis import base, blank_patches, vocabulary, words
from alignvlm_jax.benchmarks import runner
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.models import vlm
from alignvlm_jax.pictures import plotting
from tests.analysis.test_vocabulary import SPLIT, probabilities
from tests.pictures.pictures import area, decode

ANALYSIS = words.Words()


def visual_tokens(loaded, variables) -> np.ndarray:
    """Of the patches of the first two documents."""
    records = runner.shards.RecordSource(loaded.config.data.dir, SPLIT)
    tiles = tiles_lib.tiles_of(loaded, [records[0], records[1]])

    def apply(model, params, batch):
        return model.apply({**params, **variables}, batch, method="visual_tokens")

    parts = list(tiles_lib.map_tiles(loaded, apply, {"tiles": tiles}))
    return np.concatenate(parts).reshape(-1, loaded.config.model.llm.width)


def averages(loaded, p: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """Of the text embeddings, by the part of p that is kept."""
    kept = np.where(is_kept, p, 0)
    return kept / kept.sum(-1, keepdims=True) @ np.asarray(loaded.params["llm"]["embed"]["table"])


@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_the_likeliest_words_make_the_visual_tokens(loaded, top_k):
    p = probabilities(loaded, 2)
    rank = (-p).argsort(-1).argsort(-1)
    found = visual_tokens(words.with_top_k(loaded, top_k), {})
    np.testing.assert_allclose(found, averages(loaded, p, rank < (top_k or p.shape[1])), atol=1e-4)


def test_given_words_make_the_visual_tokens(loaded):
    """Each patch of a tile has its own, the same in every tile; -1 is none."""
    p = probabilities(loaded, 2)
    num_words = loaded.config.model.llm.unpadded_vocab_size
    num_patches = loaded.config.model.vision.num_patches
    drawn = words.draw(np.arange(num_words) % 2 == 0, num_patches, 3, seed=1)
    drawn[1, 2] = -1
    is_kept = (np.tile(drawn, (len(p) // num_patches, 1))[..., None] == np.arange(p.shape[1])).any(
        1
    )
    found = visual_tokens(loaded, vlm.keeping(drawn))
    np.testing.assert_allclose(found, averages(loaded, p, is_kept), atol=1e-4)
    # Also of a model whose patches would keep their likeliest.
    again = visual_tokens(words.with_top_k(loaded, 2), vlm.keeping(drawn))
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_random_words_are_those_that_patches_use():
    used = np.arange(40) % 3 == 0
    drawn = words.draw(used, 50, 4, seed=0)
    assert drawn.shape == (50, 4) and used[drawn].all()
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    assert len(np.unique(drawn)) == used.sum()  # patches have different ones
    np.testing.assert_array_equal(drawn, words.draw(used, 50, 4, seed=0))
    assert (drawn != words.draw(used, 50, 4, seed=1)).any()
    with pytest.raises(UserError, match=r"--top_k has 15, and patches use 14 words"):
        words.draw(used, 50, 15, seed=0)


def test_their_probability(loaded):
    p = probabilities(loaded, 5)
    num_patches = loaded.config.model.vision.num_patches
    num_words = loaded.config.model.llm.unpadded_vocab_size
    drawn = words.draw(np.ones(num_words, bool), num_patches, 3, seed=0)
    tiles = vocabulary.tiles_of(loaded, SPLIT, 100)
    count, masses = words.mean_masses(loaded, tiles, drawn)
    assert count == len(p)
    expected = np.sort(p, -1)[:, ::-1][:, :3].cumsum(-1).mean(0)
    np.testing.assert_allclose(masses["likeliest"], expected, atol=1e-5)
    picked = np.take_along_axis(p, np.tile(drawn, (len(p) // num_patches, 1)), -1)
    np.testing.assert_allclose(masses["random"], picked.cumsum(-1).mean(0), atol=1e-5)


def untimed(found: dict) -> dict:
    """What does not differ from one time to the next."""
    blanks = found["blank_patches"]
    points = [{**point, "seconds": None} for point in blanks["points"]]
    return {**found, "blank_patches": {**blanks, "points": points, "time_spread": None}}


def test_predictions_are_kept_and_taken_up_again(loaded, monkeypatch):
    arguments = (loaded, SPLIT, "unseen_fonts", 2)
    options = {"threshold": 1e-6, "top_k": [2, 1, 2], "seed": 0}
    found = words.measure(*arguments, **options)
    assert [point["top_k"] for point in found["points"]] == [1, 2]
    assert found["points"][0]["likeliest"]["mass"] < found["points"][1]["likeliest"]["mass"]
    kept = {path.name for path in (base.folder(loaded) / "words").glob("*.jsonl")}
    names = ("all", "top_1", "top_2", "random_1", "random_2")
    assert kept == {f"{SPLIT}_{name}.jsonl" for name in names} | {
        f"{SPLIT}_blank_{name}.jsonl" for name in ("pixels", "patches")
    }
    clean = runner.Runner(loaded).evaluate(SPLIT, blind=False)
    path = base.folder(loaded) / "words" / f"{SPLIT}_all.jsonl"
    assert runner.predictions.read(path).rows == clean.rows
    assert found["all"] == base.scores(clean)

    def generates(*args, **kwargs):
        raise AssertionError("a question is answered again")

    monkeypatch.setattr(runner.Runner, "_generate", generates)
    assert untimed(words.measure(*arguments, **options)) == untimed(found)
    # Other random words are another trial.
    with pytest.raises(AssertionError, match="answered again"):
        words.measure(*arguments, **options | {"seed": 1})


@pytest.mark.parametrize(
    ("top_k", "message"), [([1, 400], r"--top_k has 400; .* \d+ words"), ([], "--top_k has no")]
)
def test_numbers_that_do_not_fit_are_refused(loaded, top_k, message):
    with pytest.raises(UserError, match=message):
        ANALYSIS.check(loaded.config, argparse.Namespace(top_k=top_k))


FOUND = {
    "num_words": 5000,
    "num_used": 66,
    "num_patches": 640,
    "points": [
        {"top_k": k}
        | {
            kept: {"anls": anls, "exact_match": 0.1, "mass": mass, "num_eval": 9}
            for kept, anls, mass in (("likeliest", 0.7 + k / 100, 0.8), ("random", 0.05, 0.02))
        }
        for k in (1, 8)
    ],
    "all": {"anls": 0.9, "exact_match": 0.5, "num_eval": 9},
}


WITH_BLANKS = FOUND | {
    "blank_patches": {
        "contrast": 24,
        "min_space": 0.9,
        "num_pages": 3,
        "trained_on": "none",
        "time_spread": 0.1,
        "points": [
            {"dropped": dropped, "kept": kept, "anls": anls, "exact_match": 0.5, "seconds": 0.02}
            for dropped, kept, anls in (
                ("none", 1.0, 0.9),
                ("pixels", 0.5, 0.4),
                ("patches", 0.4, 0.3),
            )
        ],
    }
}


def test_blank_patches_in_table_picture_and_sentence():
    printed = []
    ANALYSIS.show(types.SimpleNamespace(print=printed.append), WITH_BLANKS)
    columns = {column.header: list(column.cells) for column in printed[2].columns}
    assert columns["blank patches dropped"] == ["none", "by pixels", "by what they say"]
    assert columns["visual tokens"] == ["100.0%", "50.0%", "40.0%"]
    assert columns["ms an answer"] == ["20.0"] * 3
    assert "less than 24 levels" in printed[3] and "above 0.9" in printed[3]
    assert ANALYSIS.sentence(WITH_BLANKS).endswith(
        " Trained with all, it scores ANLS 0.900 with 100% of the visual tokens; 0.400 with 50% of "
        "the visual tokens, blank ones dropped by pixels; 0.300 with 40% of the visual tokens, "
        "blank ones dropped by what they say."
    )
    better = copy.deepcopy(WITH_BLANKS)
    better["blank_patches"]["points"][1]["anls"] = 0.85
    before, after = (decode(ANALYSIS.picture("align", found)) for found in (WITH_BLANKS, better))
    assert area(after, plotting.QUIET) > area(before, plotting.QUIET)
    # Times that mean nothing are not shown.
    noisy = copy.deepcopy(WITH_BLANKS)
    noisy["blank_patches"] |= {"time_spread": 0.5, "trained_on": "pixels"}
    assert "ms an answer" not in [
        one.header for one in blank_patches.table(noisy["blank_patches"]).columns
    ]
    note = blank_patches.note(noisy["blank_patches"])
    assert "differed by 50%" in note and "is not asked with all" in note


def test_blank_patches_are_those_that_say_space(loaded, monkeypatch):
    """Of a run of them the first stays; prompts have as many image tokens."""
    p = probabilities(loaded, 2)[:, loaded.tokenizer.space_id]
    limit = float(np.median(p))
    monkeypatch.setattr(blank_patches, "MIN_SPACE", limit)
    records = runner.shards.RecordSource(loaded.config.data.dir, SPLIT)
    pages = [tiles.pixels for i in (0, 1) for tiles in loaded.builder.tile_pages(records[i])]
    keep = blank_patches.by_what_they_say(loaded, pages)
    is_blank = (p > limit).reshape(-1, *loaded.config.model.vision.patch_grid)
    kept = np.concatenate([keep(page) for page in pages])
    for tile, found in zip(is_blank, kept.reshape(is_blank.shape), strict=True):
        for row, one in zip(tile.tolist(), found.tolist(), strict=True):
            assert one == [not x or i == 0 or not row[i - 1] for i, x in enumerate(row)]
    builder = dataclasses.replace(loaded.builder, keep=keep)
    prompt = builder.prompt(records[0], "Who?")
    count = sum(int(keep(tiles.pixels).sum()) for tiles in builder.tile_pages(records[0]))
    assert (prompt["tokens"] == loaded.config.model.image_token_id).sum() == count
    assert 0 < count < loaded.config.model.vision.num_patches * builder.num_tiles(prompt)


def test_a_model_that_was_trained_without_blank_patches_is_not_asked_with_all(loaded):
    data = dataclasses.replace(loaded.config.data, blank_contrast=40)
    without = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))
    own = {"anls": 0.5, "exact_match": 0.5, "num_eval": 1}
    found = blank_patches.measure(without, SPLIT, runner.Runner(without), own)
    assert [point["dropped"] for point in found["points"]] == ["pixels", "patches"]
    assert found["points"][0].items() > own.items() and found["contrast"] == 40


def test_the_picture_follows_the_numbers():
    better = copy.deepcopy(FOUND)
    better["points"][1]["random"]["anls"] = 0.6
    before, after = (decode(ANALYSIS.picture("align", found)) for found in (FOUND, better))
    # A line that rises is longer than one that is level.
    assert area(after, plotting.COLORS[1]) > area(before, plotting.COLORS[1])


def test_table_and_sentence(tmp_path):
    printed = []
    ANALYSIS.show(types.SimpleNamespace(print=printed.append), FOUND)
    columns = [list(column.cells) for column in printed[0].columns]
    assert columns[0] == ["1", "8", "all 5,000"]
    assert columns[1] == ["0.7100", "0.7800", "0.9000"] and columns[4][:2] == ["0.0500", "0.0500"]
    assert columns[3] == ["0.8000", "0.8000", "1.0000"] and columns[6][:2] == ["0.0200", "0.0200"]
    settings = {"split": "seen_fonts", "num_questions": 9, "pages": "validation"}
    section = ANALYSIS.section(tmp_path, FOUND | {"step": 7, "settings": settings})
    assert section["sentence"] == (
        "With the likeliest word of each patch alone, which has 80.0% of its probability, the "
        "answers score ANLS 0.710, with the 8 likeliest words 0.780, with all 5,000 0.900; with 8 "
        "random ones of the 66 that patches use 0.050."
    )
    assert section["source"] == "9 questions of seen fonts, patches of validation, step 7"
