"""Principal components as NumPy's SVD has them, what a set of tokens covers, and how that is
shown."""

import numpy as np
import pytest

from alignvlm_jax.analysis import pca
from alignvlm_jax.data import shards
from alignvlm_jax.inference import loading
from alignvlm_jax.pictures import plotting
from tests.pictures.pictures import area, decode, has

ANALYSIS = pca.PCA()


def test_components():
    vectors = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7) + 3
    found = pca.components(vectors, 2)
    centred = vectors - vectors.mean(0)
    _, sizes, directions = np.linalg.svd(centred)
    np.testing.assert_allclose(found.fractions, (sizes**2 / (sizes**2).sum())[:2])
    np.testing.assert_allclose(np.abs(found.directions @ directions[:2].T), np.eye(2), atol=1e-10)
    np.testing.assert_allclose(found.project(vectors).var(0), sizes[:2] ** 2 / 50)
    assert len(pca.components(vectors[:3], 10).fractions) == 2


def test_coverage(monkeypatch):
    # Two groups of tokens: those of one lie along x, those of the other along y, which varies
    # thrice as much.
    x, y = np.zeros((2, 10, 2))
    x[:, 0] = np.arange(10) - 4.5
    y[:, 1] = 3 * (np.arange(10) - 4.5)
    table = np.concatenate([x, y])
    monkeypatch.setattr(pca, "NUM_COMPONENTS", 1)
    one, other = (
        pca.coverage(table, ids, np.random.default_rng(0)) for ids in np.arange(20).reshape(2, 10)
    )
    assert (one["explained"], other["explained"]) == (pytest.approx(0.1), pytest.approx(0.9))
    scale = np.sqrt((table**2).sum(-1).mean())
    nearest = [np.hypot(0.5, value) for value in np.abs(y[:, 1])]
    assert one["nearest"] == pytest.approx(np.mean(nearest) / scale)
    assert pca.coverage(table, np.arange(20), np.random.default_rng(0))["nearest"] is None


def test_token_sets(trained_workdir):
    loaded = loading.load(trained_workdir, loading.load_config(trained_workdir))
    num_tokens = loaded.config.model.llm.unpadded_vocab_size
    chosen = np.zeros(num_tokens, bool)
    chosen[[3, 9, 11]] = True
    sets = pca.token_sets(loaded, chosen, "seen_fonts", seed=0)
    assert sets["chosen"].tolist() == [3, 9, 11]
    assert [len(np.unique(ids)) for ids in sets.values()] == [3, 3, 3]
    counts = pca.token_counts(loaded, "seen_fonts", num_tokens)
    source = shards.RecordSource(loaded.config.data.dir, "seen_fonts")
    records = [source[i] for i in range(len(source))]
    texts = [text for r in records for t in r.turns for text in (t.question, *t.answers)]
    texts += [r.lines[0][0][0].text for r in records]
    assert counts.sum() == sum(len(loaded.tokenizer.encode(text)) for text in texts)
    rest = np.setdiff1d(np.arange(num_tokens), sets["most frequent"])
    assert counts[sets["most frequent"]].min() >= counts[rest].max()


def picture(nearest: float | None) -> np.ndarray:
    every = np.random.default_rng(0).normal(size=(40, 2))
    sets = {
        name: {"explained": 0.5, "nearest": nearest}
        for name in ("chosen", "random", "most frequent")
    }
    return decode(
        ANALYSIS.picture(
            "align",
            {
                "num_words": 40,
                "num_chosen": 10,
                "shares": [0.5, 0.1, 0.05],
                "sets": sets,
                "points": {"all": every.tolist(), "chosen": every[:10].tolist()},
            },
        )
    )


def test_chosen_and_controls():
    image = picture(0.5)
    bars = image[:, image.shape[1] * 6 // 10 :]
    assert area(bars, plotting.QUIET) > 1.9 * area(bars, plotting.COLORS[0]) > 0
    assert has(image[:, : image.shape[1] // 2], plotting.QUIET).any()


def test_where_no_token_is_left_there_are_no_distances():
    with_distances = picture(0.5)
    without = picture(None)
    assert area(without, plotting.COLORS[0]) < 0.7 * area(with_distances, plotting.COLORS[0])


def test_sentence():
    sets = {
        name: {"explained": fraction}
        for name, fraction in (("chosen", 0.5), ("random", 0.4), ("most frequent", 0.3))
    }
    fields = {
        "num_components": 10,
        "num_chosen": 3400,
        "num_words": 128_000,
        "sets": sets,
    }
    text = ANALYSIS.sentence(fields)
    assert "the 3,400 words that patches use explain 50.0 % of the variance of all 128,000" in text
    assert text.endswith("random words explain 40.0 %, of the most frequent 30.0 %.")
