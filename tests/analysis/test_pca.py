"""Principal components as NumPy's SVD has them, and what a set of words covers."""

import numpy as np
import pytest

from alignvlm_jax.analysis import pca
from alignvlm_jax.data import shards
from alignvlm_jax.inference import loading


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
    # Two groups of words: those of one lie along x, those of the other along y, which varies thrice
    # as much.
    x, y = np.zeros((2, 10, 2))
    x[:, 0] = np.arange(10) - 4.5
    y[:, 1] = 3 * (np.arange(10) - 4.5)
    table = np.concatenate([x, y])
    monkeypatch.setattr(pca, "NUM_COMPONENTS", 1)
    one, other = (
        pca.coverage(table, words, np.random.default_rng(0))
        for words in np.arange(20).reshape(2, 10)
    )
    assert (one["explained"], other["explained"]) == (pytest.approx(0.1), pytest.approx(0.9))
    scale = np.sqrt((table**2).sum(-1).mean())
    nearest = [np.hypot(0.5, value) for value in np.abs(y[:, 1])]
    assert one["nearest"] == pytest.approx(np.mean(nearest) / scale)
    assert pca.coverage(table, np.arange(20), np.random.default_rng(0))["nearest"] is None


def test_word_sets(trained_workdir):
    loaded = loading.load(trained_workdir, loading.load_config(trained_workdir))
    unpadded_vocab_size = loaded.config.model.llm.unpadded_vocab_size
    chosen = np.zeros(unpadded_vocab_size, bool)
    chosen[[3, 9, 11]] = True
    sets = pca.word_sets(loaded, chosen, "seen_fonts", seed=0)
    assert sets["chosen"].tolist() == [3, 9, 11]
    assert [len(np.unique(words)) for words in sets.values()] == [3, 3, 3]
    counts = pca.word_counts(loaded, "seen_fonts", unpadded_vocab_size)
    source = shards.RecordSource(loaded.config.data.dir, "seen_fonts")
    records = [source[i] for i in range(len(source))]
    texts = [text for r in records for t in r.turns for text in (t.question, *t.answers)]
    texts += [r.lines[0][0][0].text for r in records]
    assert counts.sum() == sum(len(loaded.tokenizer.encode(text)) for text in texts)
    rest = np.setdiff1d(np.arange(unpadded_vocab_size), sets["most frequent"])
    assert counts[sets["most frequent"]].min() >= counts[rest].max()
