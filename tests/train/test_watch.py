"""A process that hangs ends itself; one that is only slow does not."""

import faulthandler
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from alignvlm_jax.train import watch
from alignvlm_jax.train.goodput import CATEGORY_OF, Phases
from alignvlm_jax.train.watch import Watchdog

SECOND = 1 / 60
"""In minutes."""

STEPS = """
    import ctypes, sys, threading, time
    from pathlib import Path
    from alignvlm_jax.train import watch
    from alignvlm_jax.train.goodput import Phases

    def stuck_in_a_sleep():
        time.sleep(60)

    def stuck_at_a_lock():
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    def stuck_in_c():
        # As a collective: without Python's lock, and not to be interrupted.
        libc = ctypes.CDLL(None)
        while True:
            libc.sleep(60)

    def stuck_in_c_with_the_lock():
        ctypes.PyDLL(None).sleep(60)

    def in_another_thread():
        thread = threading.Thread(target=stuck_in_a_sleep)
        thread.start()
        thread.join()

    def phase(name, action):
        with phases.enter(name):
            action()

    def ship():
        print(f"shipped, lived {time.monotonic() - began} s", flush=True)

    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    log = open(folder / "host-0.log", "a", buffering=1)
    phases = Phases()
    watch.FINAL_SECONDS = 0.5
    watchdog = watch.Watchdog(phases, 1 / 60, log, ship, grace=0.3)
    with phases.enter("training"), watchdog:
        for number in range(1, 6):
            time.sleep(0.02)
            phases.step(number)
        began = time.monotonic()
        print("steps done", flush=True)
        {stuck}
    print("all done")
"""


def start(folder: Path, stuck: str) -> subprocess.Popen:
    program = textwrap.dedent(STEPS.replace("{stuck}", stuck))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_stuck_step_dumps_all_stacks_and_ends_with_75(tmp_path):
    names = ("stuck_in_a_sleep", "stuck_at_a_lock", "stuck_in_c", "in_another_thread")
    processes = {name: start(tmp_path / name, f"{name}()") for name in names}
    for name, process in processes.items():
        out, err = process.communicate(timeout=30)
        assert process.returncode == watch.STALLED_STATUS == 75
        assert "all done" not in out and "shipped" in out
        # One second without a step, 0.3 until the end, and two looks at the clock.
        seconds = float(re.search(r"lived (.*) s", out)[1])
        assert 1.3 <= seconds < 3
        for text in (err, (tmp_path / name / "host-0.log").read_text()):
            assert f"in {name}" in text, text
            assert "in stuck_in_a_sleep" in text or name != "in_another_thread"
            assert "no progress for 1 s while training, after step 5; the limit is 1 s" in text
        assert "ended with status 75: the same command goes on from the newest checkpoint" in err


def test_a_c_call_that_keeps_pythons_lock_does_not_save_a_process(tmp_path):
    process = start(tmp_path, "stuck_in_c_with_the_lock()")
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert "in stuck_in_c_with_the_lock" in (tmp_path / "host-0.log").read_text()


def test_without_such_timers_the_last_resort_is_status_1(tmp_path):
    process = start(
        tmp_path, "watchdog._exit_timer = None; time.sleep(0.2); stuck_in_c_with_the_lock()"
    )
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert "in stuck_in_c_with_the_lock" in (tmp_path / "host-0.log").read_text()


MOVES = {
    # Steps of 0.7 s, and a limit of 1.
    "slow steps": "for number in range(6, 10): time.sleep(0.7); phases.step(number)",
    # Three times as much is allowed for each batch, not for all of them.
    "validation": "phase('validating', lambda: [(time.sleep(1.5), phases.progress()) for batch in "
    "range(3)])",
    "save": "phase('saving', lambda: time.sleep(2.5))",
    "compile": "phase('compiling', lambda: time.sleep(4))",
    # Over the limit, and below 20 median steps, which are of 0.3 s.
    "a pause": "[(time.sleep(0.3), phases.step(number)) for number in range(6, 16)]; "
    "time.sleep(2.5)",
}


def test_a_run_that_moves_is_left_alone(tmp_path):
    processes = {name: start(tmp_path / name, stuck) for name, stuck in MOVES.items()}
    for name, process in processes.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, (name, err)
        assert (
            "all done" in out and err == "" and (tmp_path / name / "host-0.log").read_text() == ""
        )


def test_a_run_that_moves_on_while_stacks_are_dumped_is_left_alone(tmp_path):
    process = start(tmp_path, "time.sleep(1.15); phases.step(6)")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "all done" in out
    assert "no progress for 1 s" in err


def test_a_process_that_was_stopped_is_not_stuck(tmp_path):
    """As by Ctrl-Z: here it has a terminal, so no timer in C runs on."""
    primary, secondary = os.openpty()
    program = textwrap.dedent(STEPS).replace("{stuck}", "for _ in range(7): time.sleep(0.1)")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        text=True,
        stdin=secondary,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == "steps done\n"
        time.sleep(0.2)  # The watchdog has seen the last step.
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0
    assert "no progress" not in (tmp_path / "host-0.log").read_text()
    os.close(primary)
    os.close(secondary)


def test_before_the_second_step_and_in_other_phases_limits_are_longer():
    phases = Phases()
    watchdog = Watchdog(phases, 10, io.StringIO())
    assert watchdog.limit() == 3600
    with phases.enter("training"):
        phases.step(1)
        phases.step(2)
        assert watchdog.limit() == 600
        with phases.enter("saving"):
            assert watchdog.limit() == 1800
        phases._step_seconds.extend([100] * 9)
        assert watchdog.limit() == 2000
        with phases.enter("compiling"):  # A new stage: its steps may be slower.
            assert watchdog.limit() == 3600
        assert watchdog.limit() == 3600
    assert watch.LIMITS.keys() == CATEGORY_OF.keys()


def test_0_minutes_is_no_watchdog():
    with Watchdog(Phases(), 0, io.StringIO()) as watchdog:
        assert watchdog.limit() is None


def test_nothing_is_left_running(tmp_path):
    with (tmp_path / "log").open("w") as log, Watchdog(Phases(), SECOND, log):
        time.sleep(0.2)
    time.sleep(1.5)
    assert (tmp_path / "log").read_text() == ""
    faulthandler.cancel_dump_traceback_later()
