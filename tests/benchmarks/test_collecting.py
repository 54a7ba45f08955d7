"""Rows are kept as they come; what stands on stderr meanwhile."""

import pytest

from alignvlm_jax.benchmarks import predictions
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import lease

HEADER = {"step": 7}


def collect(path, make, header=HEADER):
    return predictions.collect(path, header, make, name="held_out", count=3, things="texts")


def never(done):
    pytest.fail(f"asked for rows from {done} on")


def test_what_was_made_is_kept_and_not_made_again(tmp_path):
    def stopped(done):
        yield [{"id": done}]
        yield [{"id": done + 1}]
        raise KeyboardInterrupt

    path = tmp_path / "a.jsonl"
    started = []

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


def test_a_log_is_told_how_far_it_is_and_how_long_it_takes_from_the_start(
    tmp_path, monkeypatch, capsys
):
    now = [100.0]
    monkeypatch.setattr(predictions.time, "monotonic", lambda: now[0])

    def make(done):
        # A batch within the first text.
        yield []
        now[0] += 60
        # As the answers of a batch: both at the same moment.
        yield [{"id": 0}]
        yield [{"id": 1}]
        now[0] += 60
        yield [{"id": 2}]

    collect(tmp_path / "a.jsonl", make)
    told = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert told[0] == "held_out: 2 of 3, 0.033 texts/s, 30 s left"
    assert predictions._pace(300, 2, 1, "texts") == "150 texts/s, 0 s left"


def test_steps_that_bring_no_row_are_no_error(tmp_path):
    assert collect(tmp_path / "a.jsonl", lambda done: [[], *rows(done), []]).rows == [
        {"id": 0},
        {"id": 1},
        {"id": 2},
    ]


def rows(done):
    return [[{"id": i}] for i in range(done, 3)]


def test_two_do_not_make_the_same_at_once(folder, monkeypatch):
    for name, seconds in (("TTL_SECONDS", 4.0), ("MARGIN_SECONDS", 1.0), ("POLL_SECONDS", 0.2)):
        monkeypatch.setattr(lease, name, seconds)
    path = folder / "a.jsonl"

    def make(done):
        yield [{"id": 0}]
        with pytest.raises(
            UserError, match=r"process \d+ on .* is at held_out in .*; wait for it$"
        ):
            collect(path, never)
        yield [{"id": 1}, {"id": 2}]

    assert len(collect(path, make).rows) == len(predictions.read(path).rows) == 3


@pytest.mark.parametrize("count", [2, 4])
def test_a_file_of_other_rows_than_there_are_is_made_anew(tmp_path, capsys, count):
    path = tmp_path / "a.jsonl"
    for suffix in ("", ".partial"):
        path.with_name(path.name + suffix).write_text(
            "".join(f"{line}\n" for line in ['{"step": 7}', *['{"id": 9}'] * count])
        )
    if count < 3:
        path.with_name("a.jsonl.partial").unlink()
    assert collect(path, rows).rows == [{"id": 0}, {"id": 1}, {"id": 2}]
    assert capsys.readouterr().err.count(f"a.jsonl has {count} of 3 rows, and is made anew") == 1


def test_a_workdir_may_move(tmp_path):
    path = tmp_path / "a.jsonl"
    header = {"step": 7, "checkpoint": "runs/a/checkpoints/7"}
    collect(path, rows, header)
    assert len(collect(path, never, header | {"checkpoint": "/elsewhere/checkpoints/7"}).rows) == 3


def test_the_rate_names_what_is_counted(tmp_path, capsys):
    collect(tmp_path / "a.jsonl", lambda done: [[{"id": 0}], [{"id": 1}, {"id": 2}]])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "held_out" in captured.err
    assert "3/3" in captured.err
    assert " texts/s" in captured.err
