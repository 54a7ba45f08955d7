import numpy as np
import pytest

from alignvlm_jax.data import packing


def draw(count: int, seq_len: int, max_tiles: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal texts behind up to `max_tiles` tiles of an eighth of a row's share."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, max_tiles + 1, count)
    texts = np.maximum(rng.lognormal(np.log(seq_len / 20), 1.0, count), 1).astype(np.int32)
    return texts + tiles * (seq_len // (2 * max_tiles)), tiles


def of_rows(plan: packing.Packing, values: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values[plan.records], plan.offsets[:-1])


@pytest.mark.parametrize("count", [1, 2, 37, 3000])
@pytest.mark.parametrize("seq_len, max_tiles", [(100, 1), (512, 4), (1000, 9)])
def test_every_record_is_in_one_row_and_every_row_holds_its_records(count, seq_len, max_tiles):
    lengths, tiles = draw(count, seq_len, max_tiles)
    plan = packing.plan(lengths, tiles, seq_len, max_tiles, [1], 0)
    assert sorted(plan.records) == list(range(count))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == count and (np.diff(plan.offsets) > 0).all()
    assert (of_rows(plan, np.minimum(lengths, seq_len)) <= seq_len).all()
    assert (of_rows(plan, tiles) <= max_tiles).all()


def test_a_record_longer_than_a_row_has_a_row_to_itself():
    plan = packing.plan(np.array([5, 1000, 5]), np.zeros(3, int), 100, 1, [1], 0)
    assert sorted(np.diff(plan.offsets)) == [1, 2]


def test_what_fits_exactly_is_put_together():
    lengths = np.array([60, 40] * 500 + [75, 25] * 300)
    plan = packing.plan(lengths, np.zeros(len(lengths), int), 100, 1, [1], 0)
    assert (of_rows(plan, lengths) == 100).all()


def test_tiles_bind_as_well():
    lengths = np.full(90, 10)
    tiles = np.tile([2, 1, 0], 30)
    plan = packing.plan(lengths, tiles, 1000, 3, [1], 0)
    assert len(plan.offsets) == 31 and (of_rows(plan, tiles) == 3).all()


@pytest.mark.parametrize("seq_len, spread", [(2048, 1.0), (4096, 1.5), (1024, 0.7)])
def test_log_normal_lengths_fill_rows(seq_len, spread):
    lengths = np.random.default_rng(0).lognormal(5.0, spread, 20_000).astype(int).clip(1, seq_len)
    plan = packing.plan(lengths, np.zeros(20_000, int), seq_len, 1, [1], 0)
    assert lengths.sum() / (seq_len * (len(plan.offsets) - 1)) > 0.99


def test_a_plan_is_a_function_of_seed_and_epoch():
    sizes = draw(500, 512, 4)
    first = packing.plan(*sizes, 512, 4, [1, 2], 3)
    again = packing.plan(*sizes, 512, 4, [1, 2], 3)
    np.testing.assert_array_equal(first.records, again.records)
    np.testing.assert_array_equal(first.offsets, again.offsets)
    for seed, epoch in (([1, 3], 3), ([1, 2], 4)):
        assert not np.array_equal(first.records, packing.plan(*sizes, 512, 4, seed, epoch).records)


def test_rows_and_records_are_shuffled():
    lengths = np.random.default_rng(0).integers(1, 100, 20_000)
    plan = packing.plan(lengths, np.zeros(20_000, int), 512, 1, [1], 0)
    place = np.empty(20_000)
    place[plan.records] = np.repeat(np.arange(len(plan.offsets) - 1), np.diff(plan.offsets))
    assert abs(np.corrcoef(lengths, place)[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(20_000), place)[0, 1]) < 0.03


def test_one_a_row_is_a_shuffle():
    plan = packing.unpacked(50, [1], 0)
    assert sorted(plan.records) == list(range(50)) and plan.offsets.tolist() == list(range(51))
    assert plan.records.tolist() != packing.unpacked(50, [1], 1).records.tolist() != list(range(50))
