"""How patches use the vocabulary, the model that has only the tokens that are kept, and how that is
shown; odd tokens do not harm it."""

import copy
import dataclasses

import numpy as np
import pytest

from alignvlm_jax.analysis import base, vocabulary
from alignvlm_jax.benchmarks import runner
from alignvlm_jax.data import images
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import answering, patch_tokens
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.models import vlm
from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import area, decode

SPLIT = "seen_fonts"
ANALYSIS = vocabulary.Vocabulary()


def probabilities(loaded, count: int) -> np.ndarray:
    """Of the patches of the first documents, one tile each that nothing pads."""
    records = runner.shards.RecordSource(loaded.config.data.dir, SPLIT)
    pages = [images.decode_image(records[i].images[0], "") for i in range(count)]
    num_tokens = loaded.config.model.llm.unpadded_vocab_size
    looks = patch_tokens.lenses(loaded, pages, num_tokens)
    p = np.zeros((sum(map(len, looks)), loaded.config.model.llm.vocab_size))
    np.put_along_axis(
        p,
        np.concatenate([look.tokens for look in looks]),
        np.concatenate([look.probabilities for look in looks]),
        -1,
    )
    return p


def test_usage_is_that_of_the_patches(loaded):
    p = probabilities(loaded, 5)
    found = vocabulary.usage(loaded, SPLIT, num_pages=100)
    assert len(found.entropies) == len(p)
    np.testing.assert_allclose(found.mean, p.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.highest, p.max(0), atol=1e-6)
    np.testing.assert_allclose(found.entropies.mean(), vocabulary.entropy(p).mean(), rtol=1e-4)
    np.testing.assert_array_equal(found.top_counts, np.bincount(p.argmax(-1), minlength=p.shape[1]))

    facts = found.facts()
    assert facts["perplexity"]["p50"] == pytest.approx(
        2 ** np.median(vocabulary.entropy(p)), rel=1e-3
    )
    assert facts["mean_perplexity"] == pytest.approx(2 ** vocabulary.entropy(p.mean(0)), rel=1e-3)
    histogram = facts["entropy_histogram"]
    assert sum(histogram["patches"]) == len(p) == facts["num_patches"]
    middles = np.add(histogram["edges"][1:], histogram["edges"][:-1]) / 2
    width = histogram["edges"][1]
    assert np.average(middles, weights=histogram["patches"]) == pytest.approx(
        facts["entropy"]["mean"], abs=width / 2
    )
    first = found.top_tokens(loaded.tokenizer)[0]
    assert first["id"] == p.mean(0).argmax()
    assert first["share_of_patches"] == pytest.approx((p.argmax(-1) == first["id"]).mean())


def test_what_is_kept():
    used = vocabulary.Usage(
        np.array([0.6, 0.4, 0, 0]), np.array([1, 0.9, 1e-3, 0]), np.zeros(3), np.array([2, 1, 0, 0])
    )
    assert used.kept("mean", 1e-6).tolist() == [True, True, False, False]
    assert used.kept("highest", 1e-6).tolist() == [True, True, True, False]
    with pytest.raises(UserError, match=r"leaves no word: the largest mean is 0\.6"):
        used.kept("mean", 0.7)


def test_the_rest_is_shared_among_the_tokens_that_are_kept(loaded):
    p = probabilities(loaded, 2)
    tokens = np.arange(p.shape[1]) % 3 == 0
    records = runner.shards.RecordSource(loaded.config.data.dir, SPLIT)
    tiles = tiles_lib.tiles_of(loaded, [records[0], records[1]])

    def whole(model, variables, batch):
        return model.apply(
            {**variables, **vlm.pruning(tokens)}, batch, method="patch_probabilities"
        )

    kept = np.concatenate(list(tiles_lib.map_tiles(loaded, whole, {"tiles": tiles}))).reshape(
        p.shape
    )
    np.testing.assert_allclose(kept.sum(-1), 1, atol=1e-6)
    assert (kept[:, ~tokens] == 0).all()
    np.testing.assert_allclose(
        kept[:, tokens], p[:, tokens] / p[:, tokens].sum(-1, keepdims=True), atol=1e-5
    )

    def visual_tokens(model, variables, batch):
        return model.apply({**variables, **vlm.pruning(tokens)}, batch, method="visual_tokens")

    table = np.asarray(loaded.params["llm"]["embed"]["table"])
    found = np.concatenate(
        list(tiles_lib.map_tiles(loaded, visual_tokens, {"tiles": tiles}))
    ).reshape(len(p), -1)
    np.testing.assert_allclose(found, kept @ table, atol=1e-4)


def test_all_tokens_are_no_pruning(loaded):
    evaluator = runner.Runner(loaded)
    clean = evaluator.evaluate(SPLIT, blind=False)
    vocab_size = loaded.config.model.llm.vocab_size
    scores = vocabulary.predict(evaluator, loaded, SPLIT, np.ones(vocab_size, bool))
    (path,) = (base.folder(loaded) / "vocabulary").glob(f"*_{vocab_size}_words_*.jsonl")
    assert runner.predictions.read(path).rows == clean.rows
    assert (scores["anls"], scores["num_eval"]) == (clean.mean("score"), 6)


def test_scores_with_and_without_in_one_trace(loaded, monkeypatch):
    traces = []
    insert = answering.insert

    def traced(model, mesh, variables, state, batch, *args, **kwargs):
        traces.append(tuple((name, array.shape) for name, array in sorted(batch.items())))
        return insert(model, mesh, variables, state, batch, *args, **kwargs)

    monkeypatch.setattr(answering, "insert", traced)
    found = vocabulary.measure(loaded, SPLIT, pages="unseen_fonts", num_pages=2, threshold=0.02)
    sizes = [trial["num_words"] for trial in found["pruning"]]
    assert [trial["words"] for trial in found["pruning"]] == ["all", "mean", "highest"]
    assert sizes[0] == loaded.config.model.llm.vocab_size and sizes[1] <= sizes[2] < sizes[0]
    assert len(traces) == len(set(traces)) <= 3


def test_another_connector_has_no_distribution(loaded):
    model = loaded.config.model.with_connector("mlp")
    other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=model))
    with pytest.raises(UserError, match="'mlp' gives patches no distribution"):
        vocabulary.measure(other, SPLIT, pages=SPLIT, num_pages=1, threshold=1e-6)


FOUND = {
    "num_patches": 10,
    "entropy_histogram": {"edges": [0.0, 1.0, 2.0, 3.0], "patches": [2, 8, 0]},
    "mean_perplexity": 4.0,
    "top_words": [{"token": token, "mean": 0.5} for token in ("␣", "$x$", "中", "_{")],
    "pruning": [
        {"words": name, "num_words": 8, "anls": 0.5} for name in ("all", "mean", "highest")
    ],
}
BLUE = plotting.COLORS[0]


def picture(change=lambda found: None) -> np.ndarray:
    found = copy.deepcopy(FOUND)
    change(found)
    return decode(ANALYSIS.picture("align", found))


def lower_mean(found) -> None:
    found["top_words"][1]["mean"] = 0.1


def sharper(found) -> None:
    found["entropy_histogram"]["patches"] = [10, 0, 0]


def worse(found) -> None:
    found["pruning"][1]["anls"] = 0.1


@pytest.mark.parametrize("change", [lower_mean, sharper, worse])
def test_the_picture_follows_the_numbers(change):
    before = picture()
    after = picture(change)
    assert area(after, BLUE) < area(before, BLUE)


def test_sentence(tmp_path):
    trials = zip(("all", "mean", "highest"), (5000, 30, 40), (0.9, 0.8, 0.85), strict=True)
    fields = {
        "step": 7,
        "settings": {
            "split": "seen_fonts",
            "num_questions": 1200,
            "pages": "validation",
            "threshold": 1e-6,
        },
        "perplexity": {"p50": 1.75},
        "mean_perplexity": 40.0,
        "pruning": [
            {"words": name, "num_words": number, "anls": score} for name, number, score in trials
        ],
    }
    section = ANALYSIS.section(tmp_path, fields)
    assert "perplexity of 1.8 words (median), the mean of all that of 40.0" in section["sentence"]
    assert (
        "the 30 words alone whose mean is above 1e-06 the answers score ANLS 0.800, with all "
        "5,000 0.900" in section["sentence"]
    )
    assert section["source"] == "1,200 questions of seen fonts, patches of validation, step 7"
