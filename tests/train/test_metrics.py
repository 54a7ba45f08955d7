import io
import json
import math
import re
import struct
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import evaluator, goodput, metrics

VALUES = {"loss": 1.25, "token_accuracy": 0.5, "steps_per_second": 4.0}


def test_writer_appends_and_cuts_what_lies_beyond_the_step(folder):
    with metrics.Writer(folder, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, "align", VALUES)
    path = folder / metrics.FILE
    # A kill in the middle of a line.
    storage.write_whole(path, path.read_text() + '{"step": 2, "stage": "al')
    with metrics.Writer(folder, 2) as writer:
        writer.write(3, "read", {"loss": math.nan})
    lines = [json.loads(line) for line in (folder / metrics.FILE).read_text().splitlines()]
    assert [(line["step"], line["stage"], line["loss"]) for line in lines] == [
        (1, "align", 1.25),
        (2, "align", 1.25),
        (3, "read", None),
    ]


def test_tensorboard_gets_the_same_numbers_and_forgets_what_was_cut(folder):
    for step in (0, 2):
        with metrics.Writer(folder, step) as writer:
            writer.write(step + 1, "align", {"loss": step + 0.5, "grad_norm": math.inf})
    events = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        for record in read_records(path.read_bytes()):
            event = Event.FromString(record)
            events.setdefault(path.suffix, []).append(event)
    assert [event.step for event in events[".2"] if event.HasField("session_log")] == [3]
    scalars = [
        (e.step, value.tag, value.simple_value)
        for e in events[".0"] + events[".2"]
        for value in e.summary.value
    ]
    assert scalars == [(1, "loss", 0.5), (3, "loss", 2.5)]


def read_records(data: bytes):
    """Yields the records of a TFRecord file: length (8 bytes), its checksum (4), bytes, their
    checksum (4)."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_lines_of_others_are_no_evaluations(tmp_path):
    path = tmp_path / metrics.FILE
    assert metrics.num_evaluations(path, 4) is None and metrics.last_step(path) == 0
    with metrics.Writer(tmp_path, 0) as writer:
        writer.write(4, "a", {"loss": 1.0})
        writer.write(4, "a", {"validation/answer_loss": 1.0})
        writer.write(4, "a", {})  # of an evaluation that found nothing
    path.write_text(path.read_text() + '{"step": 4, "note": "mine"}\n{"step": 3}\n{"step": 9')
    assert metrics.num_evaluations(path, 4) == 2 and metrics.last_step(path) == 4


def test_only_waits_that_leave_the_device_idle_count(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    interval = metrics.Interval()

    def batches(seconds):
        nonlocal now
        now += seconds
        yield {}

    for seconds, is_busy in ((0.5, True), (0.25, False), (3.25, True)):
        assert interval.next_batch(batches(seconds), lambda is_busy=is_busy: is_busy) == {}
        interval.add({"loss": 1.0})
    now += 6.0
    assert interval.means() == {"loss": 1.0, "steps_per_second": 0.3, "data_wait_fraction": 0.025}


@pytest.mark.parametrize(
    "line", ['{"step": 1', '"text"', '{"loss": 1}', '{"step": null}', "\x00\x00"]
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / metrics.FILE
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    before = path.read_text()
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 2 "):
        metrics.Writer(tmp_path, 5)
    assert path.read_text() == before


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl at step 5: No space left"):  # noqa: SIM117
        with metrics.Writer(tmp_path, 0) as writer:
            writer._file = storage.Appender(Path("/dev/full"))
            writer.write(5, "align", VALUES)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which stands still unless a test moves it."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_comes_at_once_every_half_minute_and_at_the_end(clock):
    """However long a stage or a step is: whoever reads a log sees that it runs."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    with metrics.Progress(console, 100) as progress:
        for step in range(1, 101):
            progress.update(step, "align" if step <= 40 else "read", VALUES)
            clock[0] += 2.5
    lines = console.file.getvalue().splitlines()
    shown = [int(re.search(r"step (\d+)/100", line)[1]) for line in lines]
    assert shown == [1, 13, 25, 37, 41, 53, 65, 77, 89, 100]
    assert " left" not in lines[-1]
    assert lines[0] == (
        "align  step 1/100  25 s left  4.00 steps/s  loss 1.250  token accuracy 0.500"
    )


def test_a_slow_step_is_told_in_seconds():
    console = Console(file=io.StringIO(), soft_wrap=True)
    with metrics.Progress(console, 101) as progress:
        progress.update(1, "align", VALUES | {"steps_per_second": 1 / 18}, is_whole=False)
    assert "step 1/101  30 min 00 s left  18.0 s/step  loss" in console.file.getvalue()


def test_a_quick_first_step_alone_tells_no_time_left(clock):
    """Most of it may be what is done but once: of a stage of ten minutes it made an hour."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    with metrics.Progress(console, 101) as progress:
        progress.update(1, "align", VALUES | {"steps_per_second": 0.5}, is_whole=False)
        clock[0] += 31
        progress.update(2, "align", VALUES | {"steps_per_second": 4.0})
        clock[0] += 31
        progress.update(3, "align", VALUES | {"steps_per_second": 0.5}, is_whole=False)
    first, *others = console.file.getvalue().splitlines()
    assert first.startswith("align  step 1/101  2.0 s/step")
    assert [re.search(r"(\d+ s) left", line)[1] for line in others] == ["25 s", "24 s"]


def test_the_time_left_is_smoothed_within_a_stage_and_starts_anew_in_the_next(clock):
    """By whole lines alone: the rate of a step or two after one says little."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    rates = [4.0] * 9 + [1.0] + [2.0] * 10
    with metrics.Progress(console, 1020) as progress:
        for step, rate in enumerate(rates, 1):
            stage = "align" if step <= 10 else "read"
            progress.update(step, stage, VALUES | {"steps_per_second": rate})
            clock[0] += 31
            progress.update(step, stage, VALUES | {"steps_per_second": 9.0}, is_whole=False)
    lines = console.file.getvalue().splitlines()
    assert all("3.08 steps/s" in line for line in lines if "step 10/" in line)
    assert "8 min 20 s left  2.00 steps/s" in lines[-1]


def test_the_time_left_has_the_pauses_that_are_to_come_and_names_the_stages(clock):
    """It told of 25 s where validation took a minute each time, and nothing of later stages."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    # Validations at 40, 60, 80, 100 and 105; saves at 50, 80 and 105.
    every = {"validating": 20, "saving": 30, "generating": 0}

    def pause(phase: str, seconds: float) -> None:
        with progress.busy(40, "read", phase, is_long=False):
            clock[0] += seconds

    with metrics.Progress(console, 200) as progress:
        progress.course = goodput.Course(20, 105, every, ["tune", "polish", "last"])
        for step in (25, 41, 81, 105):
            progress.update(step, "read", VALUES)
            clock[0] += 31
            if step == 25:
                # The first validation compiles, and counts only while there is no other.
                pause("validating", 60)
                pause("saving", 2)
            if step == 41:
                pause("validating", 30)
    lines = [line.split("  4.00")[0] for line in console.file.getvalue().splitlines()]
    then = "in this stage, then tune and 2 more"
    assert lines == [
        f"read  step 25/200  20 s and 5 validations left {then}",
        # 64 steps of 1/4 s, four validations of 60 s and three saves of 2 s.
        f"read  step 41/200  4 min 22 s left {then}",
        f"read  step 81/200  1 min 08 s left {then}",
        f"read  step 105/200  32 s left {then}",
    ]


def test_on_a_terminal_the_newest_values_show():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with metrics.Progress(console, 100) as progress:
        progress.update(99, "align", VALUES | {"mfu": 0.4125})
    assert "align  step 99/100" in console.file.getvalue()
    assert "4.00 steps/s  MFU 41.2%  loss" in console.file.getvalue()


def test_while_no_step_runs_no_time_is_left():
    """It stood still for minutes, at 0 s after the last step."""
    console = Console(file=io.StringIO(), soft_wrap=True)
    with metrics.Progress(console, 100) as progress:
        progress.update(99, "align", VALUES | {"steps_per_second": 1e3})
        with progress.busy(100, "align", "validating"):
            pass
        with progress.busy(100, "align", "saving", is_long=False):
            pass
    first, second = console.file.getvalue().splitlines()
    assert "1 s left" in first
    assert second == "align  step 100/100  validating ..."


def test_on_a_terminal_the_line_says_what_is_done():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with metrics.Progress(console, 100) as progress:
        progress.update(50, "align", VALUES)
        with progress.busy(50, "align", "saving", is_long=False):
            shown = progress._line
        after = progress._line
    assert shown == "align  step 50/100  saving ..."
    assert after.startswith("align  step 50/100  12 s left")


@pytest.mark.parametrize(
    ("seconds", "text"), [(6.6, "7 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds, text):
    assert goodput.duration(seconds) == text


def test_means_of_all_parts_and_with_several_sources_of_each():
    def means(parts):
        return {"loss": sum(parts) / len(parts)}

    assert evaluator.with_sources("validation", {"": [1.0, 3.0]}, means) == {"validation/loss": 2.0}
    assert evaluator.with_sources("validation", {"a": [1.0, 3.0], "b": [8.0]}, means) == {
        "validation/loss": 4.0,
        "validation/a/loss": 2.0,
        "validation/b/loss": 8.0,
    }
