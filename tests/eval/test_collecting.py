"""Rows are kept as they come; what stands on stderr meanwhile."""

import pytest

from alignvlm_jax.eval import collecting, predictions

HEADER = {"step": 7}


def collect(path, make, header=HEADER):
    return collecting.collect(path, header, make, name="held_out", count=3, things="texts")


def never(done):
    pytest.fail(f"asked for rows from {done} on")


def test_what_was_made_is_kept_and_not_made_again(tmp_path):
    def stopped(done):
        yield [{"id": done}]
        yield [{"id": done + 1}]
        raise KeyboardInterrupt

    path, started = tmp_path / "a.jsonl", []

    def rest(done):
        started.append(done)
        return [[{"id": i}] for i in range(done, 3)]

    with pytest.raises(KeyboardInterrupt):
        collect(path, stopped)
    assert not path.exists()
    assert collect(path, rest).rows == [{"id": 0}, {"id": 1}, {"id": 2}]
    assert started == [2]
    assert collect(path, never) == predictions.read(path)
    collect(path, rest, {"step": 8})
    assert started == [2, 0]
    assert predictions.read(path).header == {"step": 8}


def test_the_rate_names_what_is_counted(tmp_path, capsys):
    collect(tmp_path / "a.jsonl", lambda done: [[{"id": 0}], [{"id": 1}, {"id": 2}]])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "held_out" in captured.err
    assert "3/3" in captured.err
    assert " texts/s" in captured.err
