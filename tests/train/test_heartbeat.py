"""Heartbeats are true at any moment, whole, and say how a process ended."""

import json
import os
import time
from pathlib import Path

import pytest

from alignvlm_jax import storage
from alignvlm_jax.train import heartbeat as heartbeat_lib
from alignvlm_jax.train.goodput import Phases
from alignvlm_jax.train.heartbeat import Heartbeat, Others


def heartbeat(folder: Path, phases: Phases, **changes) -> Heartbeat:
    settings = {
        "process": 0,
        "num_processes": 1,
        "total": 20,
        "limit": lambda: 600.0,
        "every": 0.05,
    }
    return Heartbeat(folder, phases, **(settings | changes))


def beat_of(folder: Path, process: int = 0) -> dict:
    return heartbeat_lib.read(folder / heartbeat_lib.FOLDER, process)


def test_a_heartbeat_says_where_a_process_stands(folder):
    phases = Phases()
    phases.resume(
        3,
        dict.fromkeys(
            ("steps", "compile", "data_wait", "save", "evaluation", "restart", "other"), 10.0
        ),
    )
    with heartbeat(folder, phases, process=2, num_processes=3):
        first = beat_of(folder, 2)
        assert (first["process"], first["pid"], first["total"]) == (2, os.getpid(), 20)
        assert (first["step"], first["phase"], first["seconds_per_step"]) == (3, "starting", None)
        assert first["limit"] == 600 and first["run_seconds"] >= 70
        assert abs(first["time"] - time.time()) < 5
        with phases.enter("training"):
            for number in (4, 5, 6):
                time.sleep(0.1)
                phases.step(number)
            time.sleep(0.6)
            beat = beat_of(folder, 2)
            assert (beat["step"], beat["phase"]) == (6, "training")
            assert 0.3 < beat["since"] < 2 and 0.1 <= beat["seconds_per_step"] < 0.3
            with phases.enter("validating"):
                time.sleep(0.4)
                assert beat_of(folder, 2)["phase"] == "validating"
    assert beat_of(folder, 2)["phase"] == "done"
    assert [path.name for path in (folder / "heartbeats").iterdir()] == ["host-2.json"]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "phase"),
    [(Stopped, "stopped"), (KeyboardInterrupt, "stopped"), (ZeroDivisionError, "failed")],
)
def test_a_heartbeat_says_how_a_process_ended(tmp_path, error, phase):
    with pytest.raises(error), heartbeat(tmp_path, Phases(), stopped=(Stopped,)):
        raise error
    assert beat_of(tmp_path)["phase"] == phase
    time.sleep(0.2)
    assert beat_of(tmp_path)["phase"] == phase


def test_a_reader_never_sees_half_a_heartbeat(tmp_path):
    with heartbeat(tmp_path, Phases(), every=0.001):
        for _ in range(300):
            assert json.loads((tmp_path / "heartbeats" / "host-0.json").read_text())["total"] == 20


def test_heartbeats_of_processes_that_are_no_more_are_removed_by_the_main_process(folder):
    (folder / "heartbeats").mkdir(parents=True)
    for process in range(4):
        storage.write_whole(folder / "heartbeats" / f"host-{process}.json", "{}")
    with heartbeat(folder, Phases(), process=1, num_processes=2):
        assert beat_of(folder, 3) == {} and (folder / "heartbeats" / "host-3.json").exists()
    with heartbeat(folder, Phases(), num_processes=2):
        left = sorted(path.name for path in (folder / "heartbeats").iterdir())
    assert left == ["host-0.json", "host-1.json"]


def test_a_heartbeat_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "heartbeats").write_text("no folder")
    with heartbeat(tmp_path, Phases()):
        time.sleep(0.4)
        assert (
            len([record for record in caplog.records if "no heartbeat in" in record.message]) == 1
        )
        (tmp_path / "heartbeats").unlink()
        (tmp_path / "heartbeats").mkdir()
        time.sleep(0.4)
        assert beat_of(tmp_path)["phase"] == "starting"
    assert "heartbeats are written again" in caplog.text


def beat(process: int, **changes) -> dict:
    fields = {
        "process": process,
        "host": f"h{process}",
        "phase": "training",
        "since": 1.0,
        "step": 5,
    }
    return fields | {"data_wait": 0.01, "time": 0.0} | changes


def test_who_holds_up_the_others():
    clock = [0.0]
    others = Others(lambda: clock[0])
    assert others.poll([beat(0, time=1), beat(1, time=900)]) == []  # Whatever their clocks say.
    clock[0] = 70.0
    assert others.poll([beat(0, time=71), beat(1, time=900)]) == [
        "process 1 on h1: no new heartbeat for 70 s"
    ]
    clock[0] = 75.0
    assert others.poll([beat(0, time=76), beat(1, time=905)]) == []
    clock[0] = 80.0
    waiting = [beat(i, time=80 + i, since=40.0) for i in range(3)]
    waiting.append(beat(3, time=80, since=41.0, phase="waiting"))
    assert others.poll(waiting) == [
        "process 3 on h3: waiting for 41 s at step 5, and 3 others wait in a step"
    ]
    # All validate, or compile, for long: nobody is late.
    assert (
        others.poll([beat(i, time=90 + i, since=90.0, phase="validating") for i in range(4)]) == []
    )
    slow = [beat(i, time=100 + i) for i in range(3)] + [beat(3, time=100, data_wait=0.2)]
    assert others.poll(slow) == [
        "process 3 on h3: waits for data 20% of the time, the others 1% at most"
    ]
    assert Others().poll([beat(0, data_wait=0.9)]) == []


def test_the_main_process_logs_who_holds_up_the_others(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(heartbeat_lib, "POLL_SECONDS", 0.2)
    with heartbeat(tmp_path, Phases(), num_processes=2):
        storage.write_whole(heartbeat_lib.path_of(tmp_path / "heartbeats", 1), json.dumps(beat(1)))
        time.sleep(1)
    assert "process 1 on h1: no new heartbeat" in caplog.text


def test_what_takes_too_long_is_left_behind():
    began = time.monotonic()
    assert not heartbeat_lib.within(0.1, lambda: time.sleep(5))
    assert heartbeat_lib.within(5, lambda: None)
    assert time.monotonic() - began < 2
