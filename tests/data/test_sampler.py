import collections
import dataclasses
import itertools
import json
import threading
import time
from concurrent import futures

import numpy as np
import pytest

from alignvlm_jax.config import DataConfig, SourceConfig
from alignvlm_jax.data import mixture, sampler
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.sampler import Mixed, Shuffled
from alignvlm_jax.errors import UserError

SEQ_LEN = 256
NUM_SEQUENCES = 32_000
SIZES = (300, 120, 40)
SOURCES = {
    "a": SourceConfig(dir="a", weight=2.0),
    "b": SourceConfig(dir="b", repeat=1.5),
    "c": SourceConfig(dir="c", cap=15),
}


def data_config(**changes) -> DataConfig:
    data = DataConfig(
        seq_len=SEQ_LEN,
        max_tiles=4,
        sources=SOURCES,
        packing="offline",
        temperature=1.3,
        tasks={"transcribe": 0.5, "answer": 0.5},
    )
    return dataclasses.replace(data, **changes)


def mixed(data, sizes, known, seed, num_sequences: int = NUM_SEQUENCES) -> Mixed:
    return Mixed(data, sizes, known, seed, num_sequences)


def known_lengths() -> Lengths:
    """Of tasks answer and transcribe: a third has no answers, another third nothing to read, and of
    each some lack both."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, (2, sum(SIZES))).astype(np.int32)
    tokens[0, 0::3] = tokens[1, 1::3] = 0
    tokens[:, ::50] = 0
    return Lengths(tokens, rng.integers(0, 3, sum(SIZES)).astype(np.int16))


def planned(**changes) -> Mixed:
    return mixed(data_config(**changes), SIZES, known_lengths(), [0, 1])


def test_rows_hold_what_the_plan_says_and_no_more_than_fits():
    lengths = known_lengths()
    rows = planned()
    for row in range(rows.epoch_at(0).end):
        picks = rows.picks(row)
        assert len(picks) == rows.num_records(row) > 0
        tokens = [
            lengths.tokens[("answer", "transcribe").index(pick.task), pick.record] for pick in picks
        ]
        assert all(tokens) and sum(tokens) <= SEQ_LEN
        assert sum(lengths.tiles[pick.record] for pick in picks) <= 4


def test_rows_can_be_asked_for_in_any_order():
    rows = planned()
    other = planned()
    end = rows.epoch_at(0).end
    for row in (7 * end, 3, end + 1, 5 * end, 0):
        for a, b in zip(rows.picks(row), other.picks(row), strict=True):
            assert (a.record, a.task, a.rng.integers(2**62)) == (
                b.record,
                b.task,
                b.rng.integers(2**62),
            )
    assert rows.picks(0)[0].rng.integers(2**62) != rows.picks(1)[0].rng.integers(2**62)


def test_over_epochs_every_record_is_seen_as_often_as_its_source_is_read():
    rows = planned()
    lengths = known_lengths()
    last = rows.epoch_at(0).end
    while rows.epoch_at(last).number < 7:
        last += 1
    seen = collections.Counter(pick.record for row in range(last) for pick in rows.picks(row))
    bounds = np.cumsum([0, *SIZES])
    for begin, end in itertools.pairwise(bounds):
        usable = [i for i in range(begin, end) if lengths.tokens[:, i].any()]
        times = {seen[record] for record in usable}
        assert max(times) - min(times) <= 1
    assert not any(
        seen[record] for record in range(sum(SIZES)) if not lengths.tokens[:, record].any()
    )


@pytest.mark.parametrize("known", [None, known_lengths()])
def test_counters_are_those_of_the_rows_before(known):
    rows = mixed(data_config(), SIZES, known, [0, 1])
    end = rows.epoch_at(rows.epoch_at(0).end).end  # of two epochs
    seen = collections.Counter()
    tokens = tiles = 0
    for row in range(end + 5):
        counted = rows.counters(row)
        assert {name: counted[f"records/{name}"] for name in SOURCES} == {
            name: seen[name] for name in SOURCES
        }
        if known is not None:
            assert sum(counted[f"tokens/{name}"] for name in SOURCES) == tokens
            assert counted["packing_efficiency"] == pytest.approx(tokens / (SEQ_LEN * max(row, 1)))
            places = data_config().max_tiles * max(row, 1)
            assert counted["tile_efficiency"] == pytest.approx(tiles / places)
        for pick in rows.picks(row):
            seen["abc"[np.searchsorted(np.cumsum(SIZES), pick.record, side="right")]] += 1
            if known is not None:
                tokens += known.tokens[("answer", "transcribe").index(pick.task), pick.record]
                tiles += known.tiles[pick.record]
    assert rows.counters(end)["epoch"] == 2.0 and rows.counters(0)["epoch"] == 0.0
    # Whoever comes later counts the same, whatever was asked for before.
    fresh = mixed(data_config(), SIZES, known, [0, 1])
    for row in (end + 3, 4, end, 4):
        assert fresh.counters(row) == rows.counters(row)


def test_without_lengths_a_row_is_a_record_of_any_source():
    rows = mixed(data_config(packing="none"), SIZES, None, [0, 1])
    assert rows.epoch_at(0).end == sum(
        rows.counters(rows.epoch_at(0).end)[f"records/{name}"] for name in SOURCES
    )
    assert {len(rows.picks(row)) for row in range(100)} == {1}
    assert {pick.task for row in range(100) for pick in rows.picks(row)} == {"answer", "transcribe"}


def test_tasks_are_drawn_by_weight_of_those_that_a_record_has():
    lengths = Lengths(np.ones((2, 20_000), np.int32), np.zeros(20_000, np.int16))
    lengths.tokens[0, :5000] = lengths.tokens[1, 5000:10_000] = 0
    tasks = {"answer": 3.0, "transcribe": 1.0}
    epoch = mixed(data_config(sources={}, tasks=tasks), [20_000], lengths, [0, 1]).epoch_at(0)
    task_of = np.empty(20_000, int)
    task_of[epoch.records] = epoch.tasks
    assert (task_of[:5000] == 1).all() and (task_of[5000:10_000] == 0).all()
    assert np.mean(task_of[10_000:] == 0) == pytest.approx(0.75, abs=0.02)


def test_records_of_no_use_are_counted():
    assert planned().num_unused == (~known_lengths().tokens.any(axis=0)).sum() > 0
    assert mixed(data_config(packing="none"), SIZES, None, [0, 1]).num_unused == 0


def test_sources_without_records_are_an_error():
    with pytest.raises(
        UserError,
        match=r"none of 0 records in a, b, c has text for config.data.tasks answer, transcribe",
    ):
        mixed(data_config(packing="none"), [0, 0, 0], None, [0, 1])


def test_one_folder_shuffled_needs_no_lengths():
    rows = sampler.make(data_config(sources={}, packing="none"), [10], None, [0, 1], NUM_SEQUENCES)
    assert isinstance(rows, Shuffled) and rows.counters(25) == {"epoch": 2.5, "records": 25}
    assert sorted(rows.picks(row)[0].record for row in range(10)) == list(range(10))


@pytest.mark.parametrize("known", [None, known_lengths()])
def test_a_restored_state_gives_the_same_rows_and_counters_and_plans_no_epoch_before(
    known, monkeypatch
):
    rows = mixed(
        data_config(packing="offline" if known is not None else "none"), SIZES, known, [0, 1]
    )
    row = rows.epoch_at(0).end
    for _ in range(2):
        row = rows.epoch_at(row).end
    row += 2  # in the fourth epoch
    expected = rows.counters(row)
    state = json.loads(json.dumps(rows.state()))

    made = []
    make = Mixed._make
    monkeypatch.setattr(
        Mixed, "_make", lambda self, number: made.append(number) or make(self, number)
    )
    fresh = mixed(
        data_config(packing="offline" if known is not None else "none"), SIZES, known, [0, 1]
    )
    assert fresh.restore(state)
    assert fresh.counters(row) == expected
    assert [pick[:2] for at in range(row, row + 9) for pick in fresh.picks(at)] == [
        pick[:2] for at in range(row, row + 9) for pick in rows.picks(at)
    ]
    assert [pick.rng.random() for pick in fresh.picks(row)] == [
        pick.rng.random() for pick in rows.picks(row)
    ]
    assert fresh.counters(row + 9) == rows.counters(row + 9)
    assert min(made) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"begins": [0, *(begin + 1 for begin in state["begins"][1:])]},
        lambda state: state | {"row": state["row"] - 1},
        lambda state: state | {"tokens": [0, 0, 0]},
        lambda state: state | {"digest": "0"},
        lambda state: {},
    ],
)
def test_a_damaged_state_is_not_taken(change):
    rows = planned()
    row = rows.epoch_at(rows.epoch_at(0).end).end + 1
    expected = rows.counters(row)
    fresh = planned()
    assert not fresh.restore(change(rows.state()))
    assert fresh.counters(row) == expected


def test_a_state_without_tiles_is_planned_again():
    """As versions before wrote it: nothing else is wrong with it."""
    rows = planned()
    row = rows.epoch_at(0).end + 1
    expected = rows.counters(row)
    state = {name: value for name, value in rows.state().items() if name not in ("tiles", "digest")}
    fresh = planned()
    assert not fresh.restore(state | {"digest": rows._digest(state)})
    assert fresh.counters(row) == expected and expected["tile_efficiency"] > 0


def test_a_state_of_other_rows_is_not_taken(monkeypatch):
    rows = planned()
    rows.counters(rows.epoch_at(0).end + 1)
    state = rows.state()
    known = known_lengths()
    fewer = Lengths(known.tokens.copy(), known.tiles)
    fewer.tokens[:, 7] = np.maximum(fewer.tokens[:, 7] - 1, 1)
    others = [
        mixed(data_config(), SIZES, fewer, [0, 1]),
        mixed(data_config(), SIZES, known, [0, 2]),
        mixed(data_config(seq_len=SEQ_LEN + 1), SIZES, known, [0, 1]),
        mixed(data_config(tasks={"answer": 1.0, "transcribe": 2.0}), SIZES, known, [0, 1]),
        mixed(data_config(packing="none"), SIZES, None, [0, 1]),
    ]
    assert not any(other.restore(state) for other in others)
    assert planned().restore(state)
    monkeypatch.setattr(mixture, "_probe", lambda: "planned in another way")
    assert not planned().restore(state)


def test_an_epoch_that_is_planned_otherwise_than_before_is_an_error():
    rows = planned()
    rows.epoch_at(rows.epoch_at(0).end)
    rows._begins[1] -= 1
    rows._epochs.clear()
    with pytest.raises(RuntimeError, match="epoch 0 was planned to row"):
        rows.epoch_at(0)


def test_the_next_epoch_is_planned_before_it_is_asked_for(monkeypatch):
    made = {}
    make = Mixed._make

    def slow(self, number):
        made[number] = threading.current_thread().name
        return make(self, number)

    monkeypatch.setattr(Mixed, "_make", slow)
    rows = planned()
    rows.picks(0)
    for _ in range(200):
        if 1 in rows._epochs and rows._epochs[1].done():
            break
        time.sleep(0.01)
    assert rows._epochs[1].done() and threading.main_thread().name not in made.values()
    rows.picks(rows.epoch_at(0).end)
    assert sorted(made)[:3] == [0, 1, 2]
    # Where the stage ends before, nobody will need it.
    made.clear()
    mixed(data_config(), SIZES, known_lengths(), [0, 1], num_sequences=1).picks(0)
    time.sleep(0.1)
    assert list(made) == [0]


def test_many_threads_plan_each_epoch_once(monkeypatch):
    made = collections.Counter()
    make = Mixed._make
    monkeypatch.setattr(
        Mixed, "_make", lambda self, number: made.update([number]) or make(self, number)
    )
    rows = planned()
    expected = planned()
    end = expected.epoch_at(expected.epoch_at(0).end).end
    made.clear()
    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(rows.records, range(end + 5)))
    assert found == [expected.records(row) for row in range(end + 5)]
    assert found == [[pick.record for pick in rows.picks(row)] for row in range(end + 5)]


def test_mixtures_without_lengths_plan_only_the_epoch_that_is_read(monkeypatch):
    rows = mixed(data_config(packing="none"), SIZES, None, [0, 1])
    size = rows.epoch_at(0).end
    slow = [rows.counters(row) for row in (size - 1, size, 5 * size, 7 * size + 3)]
    made = []
    make = Mixed._make
    monkeypatch.setattr(
        Mixed, "_make", lambda self, number: made.append(number) or make(self, number)
    )
    fresh = mixed(data_config(packing="none"), SIZES, None, [0, 1])
    assert fresh.counters(7 * size + 3) == slow[-1] and min(made) == 7
    assert [fresh.counters(row) for row in (5 * size, size, size - 1)] == slow[2::-1]
