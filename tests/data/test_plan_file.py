"""Plans that one process makes and others map."""

import multiprocessing
import os
import tempfile
import time

import numpy as np
import pytest

from alignvlm_jax.config import DataConfig
from alignvlm_jax.data import arrays, mixture, packing, plan_file, sampler
from alignvlm_jax.data.lengths import Lengths


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"alignvlm_jax-{os.getuid()}"


def ask(folder: str, counter: str, line) -> None:
    """In a process of its own: asks, and tells what it has got."""
    tempfile.tempdir = folder

    def make():
        with open(counter, "a") as file:
            file.write("x")
        time.sleep(0.5)
        return {"a": np.arange(10), "b": np.zeros((2, 3), np.int8)}

    found = plan_file.shared("key", make)
    line.send((found["a"].tolist(), found["b"].shape, isinstance(found["a"], np.memmap)))


def test_of_four_processes_one_makes_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    lines = [context.Pipe() for _ in range(4)]
    counter = tmp_path / "counter"
    processes = [
        context.Process(target=ask, args=(str(tmp_path), str(counter), line)) for _, line in lines
    ]
    for process in processes:
        process.start()
    found = [ours.recv() for ours, _ in lines]
    for process in processes:
        process.join()
    assert found == 4 * [(list(range(10)), (2, 3), True)]
    assert counter.read_text() == "x"


def test_what_a_killed_process_left_is_made_again_and_what_is_outdated_goes(place):
    made = {"a": np.arange(3)}
    plan_file.shared("one", lambda: made)
    (place / "one" / plan_file.MADE).unlink()
    (place / "one" / "a.npy").write_bytes(b"half")
    assert plan_file.shared("one", lambda: made)["a"].tolist() == [0, 1, 2]
    found = plan_file.shared("two", lambda: made, "one")
    assert not (place / "one").exists() and found["a"].tolist() == [0, 1, 2]
    assert plan_file.shared("two", lambda: pytest.fail("made twice"))["a"].flags.writeable is False
    os.utime(place / "two", (0, 0))
    plan_file.shared("three", lambda: made)
    assert {path.name for path in place.iterdir()} == {"three", "three.lock", "two.lock"}
    assert found["a"].tolist() == [0, 1, 2]  # still mapped


def test_without_room_or_a_folder_of_ours_each_makes_its_own(place, monkeypatch, tmp_path):
    made = {"a": np.arange(3)}
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
        assert plan_file.shared("one", lambda: made)["a"] is made["a"]
    (tmp_path / "other").mkdir()
    for path in place.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    place.rmdir()
    place.symlink_to(tmp_path / "other")
    assert plan_file.shared("one", lambda: made)["a"] is made["a"]
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("length", [0, 20, 140, 1000])
def test_a_file_that_was_cut_short_is_made_again(place, length):
    made = {"a": np.arange(1000), "none": np.zeros(0, np.int8)}
    plan_file.shared("one", lambda: made)
    with open(place / "one" / "a.npy", "r+b") as file:
        file.truncate(length)
    for make in (lambda: made, lambda: pytest.fail("made twice")):
        found = plan_file.shared("one", make)
        assert isinstance(found["a"], np.memmap) and found["a"].tolist() == list(range(1000))
        assert not len(found["none"])


def test_what_cannot_be_written_is_computed_once_and_leaves_nothing(place, monkeypatch):
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(3), "b": np.arange(4)}

    original = np.save

    def save(file, array, **options):
        if len(array) > 3:
            raise OSError("no space left")
        original(file, array, **options)

    monkeypatch.setattr(np, "save", save)
    assert plan_file.shared("one", make)["b"].tolist() == [0, 1, 2, 3]
    assert calls == [1] and not (place / "one").exists()


def test_the_oldest_go_where_all_take_too_much(place, monkeypatch):
    made = {"a": np.zeros(1000, np.int8)}
    for age, name in enumerate(["new", "older", "oldest"]):
        plan_file.shared(name, lambda: made)
        os.utime(place / name, (time.time() - 60 - age,) * 2)
    (place / "in work").mkdir()
    os.utime(place / "in work", (time.time() - 600,) * 2)
    monkeypatch.setattr(plan_file, "MAX_BYTES", 2500)
    plan_file.shared("one", lambda: made)
    assert {path.name for path in place.iterdir() if path.is_dir()} == {"one", "new", "in work"}
    # What is asked for stays, however large.
    assert len(plan_file.shared("two", lambda: {"a": np.zeros(9000)})["a"]) == 9000
    assert {path.name for path in place.iterdir() if path.is_dir()} == {"two", "in work"}


def schedule(known: Lengths | None, **changes) -> sampler.Mixed:
    data = DataConfig(
        dir="x", seq_len=100, max_tiles=4, tasks={"answer": 0.6, "transcribe": 0.4}, **changes
    )
    return sampler.Mixed(data, [known.tokens.shape[1]], known, [3, 4], 10_000)


def test_mapped_epochs_are_those_that_a_process_makes_for_itself(place, monkeypatch):
    rng = np.random.default_rng(0)
    known = Lengths(
        rng.integers(0, 120, (2, 700)).astype(np.int32).clip(0, 100),
        rng.integers(0, 3, 700).astype(np.int16),
    )
    alone = schedule(known)
    picked = [alone.records(row) for row in range(900)]
    assert not place.exists() and len(alone.state()["begins"]) > 3
    monkeypatch.setattr(plan_file, "MIN_RECORDS", 1)
    first = schedule(known)
    assert [first.records(row) for row in range(900)] == picked
    epochs = {path.name for path in place.iterdir() if path.is_dir()}
    assert epochs and len(epochs) <= sampler.MAX_EPOCHS + 1
    # A process that comes later, or resumes, plans nothing that is there.
    later = schedule(known)
    assert later.restore(first.state())
    (last,) = {first.epoch_at(899).number}
    monkeypatch.setattr(mixture.Mixture, "epoch", lambda *_: pytest.fail("planned again"))
    assert later._make(last).records.tolist() == first.epoch_at(899).records.tolist()
    # Of other lengths, it is another plan.
    other = Lengths(known.tokens.clip(0, 50), known.tiles)
    with pytest.raises(pytest.fail.Exception):
        schedule(other)._make(0)


def test_in_blocks_the_plan_is_that_of_all_at_once(monkeypatch):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 150, 3000)
    tiles = rng.integers(0, 4, 3000)
    whole = packing.plan(lengths, tiles, 100, 4, [5], 2)
    monkeypatch.setattr(packing, "BLOCK", 7)
    parts = packing.plan(lengths, tiles, 100, 4, [5], 2)
    assert np.array_equal(whole.offsets, parts.offsets)
    assert np.array_equal(whole.records, parts.records)
    # The draws of numpy's own permutation, which earlier versions used.
    numbers = np.random.default_rng([5, 2]).permutation(3000)
    assert np.array_equal(packing.shuffled(3000, np.random.default_rng([5, 2])), numbers)


def test_large_arrays_are_mapped_and_their_damage_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    made = {"large": np.arange(1000).reshape(10, 100), "small": np.arange(3), "text": "abc"}
    arrays.write(path, made)
    monkeypatch.setattr(arrays, "MAPPED_BYTES", 1000)
    found = arrays.read(str(path), path.stat().st_size)
    assert isinstance(found["large"], np.memmap) and not found["large"].flags.writeable
    assert np.array_equal(found["large"], made["large"]) and str(found["text"]) == "abc"
    assert not isinstance(found["small"], np.memmap)
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(arrays.UserError, match="cannot be read"):
        arrays.read(str(path), len(content))
