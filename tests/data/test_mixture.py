import numpy as np
import pytest

from alignvlm_jax.config import SourceConfig
from alignvlm_jax.data import mixture


def counts(sizes, temperature=1.0, **changes) -> dict[str, int]:
    sources = {name: SourceConfig(dir=name, **changes.get(name, {})) for name in sizes}
    return mixture.counts(sizes, sources, temperature)


def test_an_epoch_is_every_record_once_unless_said_otherwise():
    assert counts({"a": 10, "b": 1_000_000, "c": 3}) == {"a": 10, "b": 1_000_000, "c": 3}


def test_repeats_are_fractional():
    assert counts({"a": 10, "b": 10, "c": 7}, a={"repeat": 2.5}, b={"repeat": 0.5}) == {
        "a": 25,
        "b": 5,
        "c": 7,
    }


def test_weights_share_what_there_is_in_all():
    assert counts({"a": 100, "b": 100}, a={"weight": 3.0}) == {"a": 150, "b": 50}
    assert counts({"a": 100, "b": 300}, a={"weight": 3.0}) == {"a": 200, "b": 200}
    assert counts({"a": 100, "b": 300, "off": 50}, off={"weight": 0.0}) == {
        "a": 100,
        "b": 300,
        "off": 0,
    }


def test_temperature_evens_out():
    sizes = {"a": 100, "b": 10_000}
    assert counts(sizes, temperature=2.0) == {"a": round(10_100 / 11), "b": round(101_000 / 11)}
    assert counts(sizes, temperature=1e6) == {"a": 5050, "b": 5050}
    assert counts(sizes, temperature=1e-6) == {"a": 1, "b": 10_100}


def test_caps_bound_and_give_to_nobody():
    assert counts({"a": 100, "b": 100}, a={"cap": 30}) == {"a": 30, "b": 100}
    assert counts({"a": 100, "b": 100}, a={"cap": 30, "weight": 0.25}) == {"a": 30, "b": 160}
    assert counts({"a": 100, "b": 100}, a={"cap": 300}) == {"a": 100, "b": 100}


def test_sources_without_records_take_no_part():
    assert counts({"a": 0, "b": 5}) == {"a": 0, "b": 5} and counts({"a": 0}) == {"a": 0}


@pytest.mark.parametrize("size, count", [(10, 10), (10, 4), (7, 25), (1, 3), (50, 49)])
def test_every_record_is_seen_before_any_is_seen_again(size, count):
    stream = np.concatenate([mixture.epoch_of(size, count, "a", [3], epoch) for epoch in range(12)])
    assert len(stream) == 12 * count
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == list(range(size))


def test_the_stream_is_of_seed_and_name_alone():
    first = mixture.epoch_of(100, 60, "a", [3], 5)
    np.testing.assert_array_equal(first, mixture.epoch_of(100, 60, "a", [3], 5))
    for other in (("b", [3], 5), ("a", [4], 5), ("a", [3], 6)):
        assert not np.array_equal(first, mixture.epoch_of(100, 60, *other))
    assert len(mixture.epoch_of(100, 0, "a", [3], 5)) == 0


def test_next_to_no_temperature_the_largest_source_is_all_but_alone():
    for temperature in (1e-3, 5e-324):
        assert counts({"a": 10, "b": 1000, "c": 0}, temperature) == {"a": 1, "b": 1010, "c": 0}
