import numpy as np
import pytest

from alignvlm_jax.data import packing
from alignvlm_jax.data.packing import Sizes


def pages(count: int, seq_len: int) -> Sizes:
    """Texts of little different lengths behind one tile."""
    lengths = np.random.default_rng(0).normal(0.08 * seq_len, 0.004 * seq_len, count).astype(int)
    return sizes(lengths, np.ones(count, int))


def texts(count: int, seq_len: int) -> Sizes:
    lengths = np.random.default_rng(0).lognormal(np.log(seq_len / 10), 1.0, count).astype(int)
    return sizes(lengths.clip(1, seq_len), np.zeros(count, int))


def mixed(count: int, seq_len: int) -> Sizes:
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 5, count)
    return sizes(rng.integers(1, seq_len // 5, count) + tiles * (seq_len // 6), tiles)


def sizes(lengths, tiles) -> Sizes:
    different, counts = np.unique(np.stack([lengths, tiles]), axis=1, return_counts=True)
    return Sizes(*different.tolist(), counts.tolist())


@pytest.mark.parametrize("way", [packing.best_fit, packing.even_fit, packing.fit])
@pytest.mark.parametrize("make", [pages, texts, mixed])
@pytest.mark.parametrize(
    "count, seq_len, max_tiles", [(1, 100, 5), (50, 100, 5), (5000, 1000, 13), (300, 2000, 4)]
)
def test_all_records_are_in_rows_that_hold_them(way, make, count, seq_len, max_tiles):
    given = make(count, seq_len)
    held = np.zeros(len(given.counts), int)
    for rows in way(given, seq_len, max_tiles):
        assert rows.count > 0 and min(rows.contents.values()) > 0
        assert sum(given.lengths[size] * each for size, each in rows.contents.items()) <= seq_len
        assert sum(given.tiles[size] * each for size, each in rows.contents.items()) <= max_tiles
        for size, each in rows.contents.items():
            held[size] += rows.count * each
    assert held.tolist() == given.counts


def num_rows(way, given: Sizes, seq_len: int) -> int:
    return sum(rows.count for rows in way(given, seq_len, 16))


def test_the_better_way_is_taken():
    for make, better, worse in (
        (texts, packing.best_fit, packing.even_fit),
        (pages, packing.even_fit, packing.best_fit),
    ):
        given = make(20_000, 4096)
        least = (
            sum(length * count for length, count in zip(given.lengths, given.counts, strict=True))
            / 4096
        )
        assert (
            num_rows(worse, given, 4096)
            > num_rows(better, given, 4096)
            == num_rows(packing.fit, given, 4096)
        )
        assert least / num_rows(better, given, 4096) > 0.98


def test_no_records_need_no_rows():
    assert packing.fit(Sizes([], [], []), 100, 1) == []
