"""Every second of a run is counted once, over stops and resumes."""

import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax.train import goodput
from alignvlm_jax.train.goodput import CATEGORIES, Phases


class Clock:
    """Stands in for time.monotonic; sleeping costs nothing."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput.time, "monotonic", clock)
    return clock


def seconds_of(phases: Phases) -> dict[str, float]:
    """Seconds by category, without those that nothing was spent on."""
    line = phases.metrics()
    assert sum(line[f"goodput/{name}"] for name in CATEGORIES) == pytest.approx(1, abs=1e-9)
    found = {name: line[f"goodput/{name}"] * line["goodput/seconds"] for name in CATEGORIES}
    return {name: pytest.approx(value, abs=1e-6) for name, value in found.items() if value > 1e-9}


def run_a_stage(phases: Phases, clock: Clock, first: int) -> list[dict]:
    """Three steps with all that surrounds them; returns the lines of metrics.jsonl."""
    clock.sleep(5)
    with phases.enter("restoring"):
        clock.sleep(4)
    lines = []
    with phases.enter("training"):
        with phases.enter("compiling"):
            clock.sleep(60)
        for number in range(first, first + 3):
            with phases.enter("waiting"):
                clock.sleep(1)
            clock.sleep(10)
            phases.step(number)
            lines.append({"step": number, **phases.metrics()})
        with phases.enter("validating"):
            clock.sleep(8)
        with phases.enter("generating"):
            clock.sleep(2)
        with phases.enter("saving"):
            clock.sleep(3)
        lines.append({"step": number, **phases.metrics()})
    return lines


def test_every_second_is_counted_once(clock):
    phases = Phases(began=clock.now - 7)
    run_a_stage(phases, clock, first=1)
    expected = {
        "steps": 30,
        "compile": 60,
        "data_wait": 3,
        "save": 3,
        "evaluation": 10,
        "other": 7 + 5 + 4,
    }
    assert seconds_of(phases) == expected
    assert phases.metrics()["goodput/seconds"] == pytest.approx(sum(expected.values()))
    assert phases.run_seconds() == pytest.approx(sum(expected.values()))
    assert phases.median_step_seconds() == 11


def test_injected_sleeps_are_where_they_belong():
    """With the real clock."""
    phases = Phases()
    with phases.enter("training"):
        time.sleep(0.20)
        with phases.enter("saving"):
            time.sleep(0.10)
        with phases.enter("waiting"):
            time.sleep(0.05)
        phases.step(1)
    line = phases.metrics()
    assert sum(line[f"goodput/{name}"] for name in CATEGORIES) == pytest.approx(1, abs=1e-9)
    for name, slept in (("steps", 0.20), ("save", 0.10), ("data_wait", 0.05)):
        assert slept <= line[f"goodput/{name}"] * line["goodput/seconds"] < slept + 0.1, name


def test_a_resumed_run_counts_what_was_lost_as_restart(clock):
    first = Phases(began=clock.now)
    lines = run_a_stage(first, clock, first=1)
    # Step 2 was saved; step 3, and what came after it, is done again.
    carried = goodput.carried(lines, step=2)
    kept = {"steps": 20, "compile": 60, "data_wait": 2, "other": 9}
    lost = 1 + 10 + 8 + 2 + 3
    assert carried == {
        name: pytest.approx(kept.get(name, lost if name == "restart" else 0)) for name in CATEGORIES
    }
    # The last heartbeat is 6 s younger than the last line.
    second = Phases(began=clock.now)
    second.resume(2, carried, beat_seconds=lines[-1]["goodput/seconds"] + 6)
    assert second.num_steps == 2
    run_a_stage(second, clock, first=3)
    before_the_first_step = 5 + 4 + 60 + 1 + 10
    assert seconds_of(second) == {
        "steps": 20 + 20,
        "compile": 60,
        "data_wait": 2 + 2,
        "save": 3,
        "evaluation": 10,
        "restart": lost + 6 + before_the_first_step,
        "other": 9,
    }


def test_a_third_process_goes_on_with_the_sums_of_both(clock):
    first = Phases(began=clock.now)
    lines = run_a_stage(first, clock, first=1)
    second = Phases(began=clock.now)
    second.resume(3, goodput.carried(lines, step=3))
    more = run_a_stage(second, clock, first=4)
    third = Phases(began=clock.now)
    third.resume(6, goodput.carried([*lines, *more], step=6))
    assert third.run_seconds() == pytest.approx(2 * (5 + 4 + 60 + 33 + 13))


def test_without_a_checkpoint_all_was_lost(clock):
    lines = run_a_stage(Phases(began=clock.now), clock, first=1)
    carried = goodput.carried(lines, step=0)
    assert carried["restart"] == pytest.approx(lines[-1]["goodput/seconds"])
    assert sum(carried.values()) == carried["restart"]


def test_lines_of_other_versions_and_without_goodput_are_passed_over():
    assert sum(goodput.carried([], 3).values()) == 0
    old = [{"step": 1, "loss": 2.0}, {"step": 2, "goodput/seconds": None}]
    assert sum(goodput.carried(old, 3).values()) == 0
    partly = [{"step": 1, "goodput/seconds": 10.0, "goodput/steps": 0.5, "goodput/other": None}]
    assert goodput.carried(partly, 3)["steps"] == 5


def test_a_phase_left_by_an_error_is_left(clock):
    phases = Phases(began=clock.now)
    with pytest.raises(ZeroDivisionError), phases.enter("training"), phases.enter("saving"):
        raise ZeroDivisionError
    assert phases.now == "starting"


def test_an_unknown_phase_is_a_fault_at_once():
    with pytest.raises(KeyError), Phases().enter("resting"):
        pass


def compile_seconds(phases: Phases) -> float:
    line = phases.metrics()
    return line["goodput/compile"] * line["goodput/seconds"]


def test_compiling_inside_another_phase_counts_as_compile():
    with Phases() as phases, phases.enter("validating"):
        began = time.monotonic()
        jax.jit(lambda x: jnp.sort(x * 17.3) + jnp.cumsum(x))(jnp.ones(77)).block_until_ready()
        whole = time.monotonic() - began
    compiled = compile_seconds(phases)
    assert 0.2 * whole < compiled < whole
    assert phases.metrics()["goodput/evaluation"] > 0
    # No longer listened to.
    jax.jit(lambda x: jnp.sort(x * 19.3))(jnp.ones(78)).block_until_ready()
    assert compile_seconds(phases) == pytest.approx(compiled)


def test_the_age_of_a_process():
    program = (
        "import time; began = time.monotonic(); time.sleep(0.5)\n"
        "from alignvlm_jax.train import goodput\n"
        "print(began - goodput.process_began())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # Python itself took some milliseconds to start; ticks are of 10 ms.
    assert -0.02 <= float(done.stdout) < 5
