"""Processes that fail, are lost, or differ: all end, soon, and the main one says why."""

import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from alignvlm_jax.parallel import exchange, peers
from tests.parallel import joined

# As the program does it, with a command that the tests make up.
COMMAND = """
import types
from alignvlm_jax import __main__ as program
from alignvlm_jax.errors import UserError
peers.LOST_SECONDS, peers.BEAT_SECONDS = 6, 0.5

def command(argv):
    distributed.initialize(argv)
    print("joined", flush=True)
    act()
    exchange.barrier()

sys.modules["alignvlm_jax.commands.train"] = types.SimpleNamespace(main=command)
program.leave_with(program.main(["train"]))
"""

# With what the program does about an exception that nobody expected.
PROGRAM = COMMAND.replace(
    'program.leave_with(program.main(["train"]))',
    """
import runpy
sys.argv = ["alignvlm_jax", "train"]
runpy.run_module("alignvlm_jax", run_name="__main__")
""",
)


def ours(text: str) -> list[str]:
    """The lines on stderr that are the program's own."""
    return [line for line in text.splitlines() if line.startswith("alignvlm_jax: error")]


Check = Callable[..., None]
GROUPS: dict[str, Callable[[Path], None]] = {}
"""Checks by name, each of a few processes that it starts for itself in a folder of its own."""


def group(*args) -> Callable[[Check], Check]:
    """A decorator that adds a check of a group of processes, called with the folder and `args`."""

    def add(check: Check) -> Check:
        GROUPS[f"{check.__name__}{len(GROUPS)}"] = lambda folder: check(folder, *args)
        return check

    return add


@group()
def all_leave_together(folder):
    done = joined.run("def act(): time.sleep(2 * index)\n" + COMMAND, 3, folder)
    assert [one.returncode for one in done] == [0, 0, 0], done


@group(0)
@group(2)
def an_error_of_one_process_ends_all_and_is_told_by_the_main_one(folder, failing):
    act = f"""
def act():
    if index == {failing}:
        raise UserError("page 7 cannot be read")
    time.sleep(100)
"""
    began = time.monotonic()
    done = joined.run(act + COMMAND, 3, folder)
    assert time.monotonic() - began < 60
    assert [one.returncode for one in done] == [1, 1, 1], done
    name = "" if failing == 0 else r"process 2 of 3 (HOST): "
    [line] = ours(done[0].stderr)
    assert line.endswith("page 7 cannot be read") and ("process 2 of 3 (" in line) == bool(name)


@group()
def what_another_process_ends_by_is_the_reason_of_one_that_lost_it(folder):
    """A save breaks where another process has ended: that one's error is told, with its status,
    which is not to be tried again."""
    act = """
from alignvlm_jax.errors import TryAgainError
def act():
    if index == 2:
        raise UserError("page 7 cannot be read")
    while not exchange.announced("failed"):
        time.sleep(0.01)
    raise TryAgainError("could not write checkpoint 4: connection reset by peer")
"""
    done = joined.run(act + COMMAND, 3, folder)
    assert [one.returncode for one in done] == [1, 1, 1], done
    assert ours(done[0].stderr)[-1].endswith("page 7 cannot be read")


@group()
def one_whose_output_cannot_be_written_tells_the_others_all_the_same(folder):
    """As where the disk is full that also holds its log."""
    act = """
def act():
    if index == 1:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1), os.dup2(full, 2)
        raise UserError("page 7 cannot be read")
    time.sleep(100)
"""
    done = joined.run(act + COMMAND, 2, folder)
    assert [one.returncode for one in done] == [1, 1], done
    assert "process 1 of 2 (" in ours(done[0].stderr)[-1] and "page 7" in ours(done[0].stderr)[-1]


@group()
def a_process_that_is_killed_is_missed(folder):
    act = """
def act():
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
"""
    done = joined.run(act + COMMAND, 3, folder)
    assert [one.returncode for one in done] == [75, -signal.SIGKILL, 75], done
    [line] = ours(done[0].stderr)
    assert "process 1 of 3 (" in line and "has not been heard of for 6 s" in line


@group()
def one_that_does_not_come_is_waited_for_and_told(folder):
    """By each of the others in one line: jax itself would abort them, with a stack of C."""
    late = (
        "distributed.START_TIMEOUT_SECONDS = 6\nif index == 2:\n    sys.exit()\ndef act(): pass\n"
    )
    done = joined.run(late + COMMAND, 3, folder)
    assert [one.returncode for one in done] == [75, 75, 0], done
    for index in (0, 1):
        assert done[index].stderr.count("\n") == 1
        assert f"process {index} of 3 waited 6 s at 127.0.0.1:" in done[index].stderr


@group()
def without_the_main_process_the_others_end(folder):
    act = """
def act():
    if index == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
"""
    began = time.monotonic()
    done = joined.run(act + COMMAND, 3, folder)
    assert time.monotonic() - began < 60
    # 75 where our own thread saw it first; mostly jax aborts them before.
    assert all(one.returncode in (75, -signal.SIGABRT) for one in done[1:]), done


@group(
    "import importlib.metadata as m; version = m.version\n"
    "m.version = lambda name: '0.1' if (index, name) == (1, 'optax') else version(name)\n",
    "the processes differ in optax: optax is ",
)
@group(
    "now = time.time\ntime.time = lambda: now() - 300 * (index == 2)\n",
    "that of process 2 is the furthest behind",
)
def processes_that_differ_are_refused(folder, difference, told):
    done = joined.run("def act(): pass\n" + difference + COMMAND, 3, folder)
    assert [one.returncode for one in done] == [1, 1, 1], done
    assert told in ours(done[0].stderr)[0]


@group()
def a_signal_that_no_command_handles_ends_all(folder):
    """jax's coordination service notes it, and goes on."""
    act = """
def act():
    if index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)
"""
    began = time.monotonic()
    done = joined.run(act + COMMAND, 2, folder)
    assert time.monotonic() - began < 60
    assert [one.returncode for one in done] == [143, 143], done
    assert (
        "process 1 of 2 (" in ours(done[0].stderr)[-1]
        and "stopped by SIGTERM" in ours(done[0].stderr)[-1]
    )


@group()
def a_signal_at_one_process_stops_all_at_the_same_point(folder):
    """Also while its main thread waits in C, where Python calls no handler."""
    code = """
    import threading
    from alignvlm_jax.train.hooks import StopSignal
    distributed.initialize()
    with StopSignal() as stop:
        if index == 1:
            threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        seen = None
        for step in range(100000):
            if stop.requested():
                break
            if index == 1 and step == 3:
                jax.jit(lambda x: jax.pure_callback(lambda x: (time.sleep(4), x)[1], x, x))(1.0).block_until_ready()
            time.sleep(0.01)
        told = exchange.gather(step)
        assert len(set(told)) == 1, told
        print(step, flush=True)
    distributed.leave()
"""
    done = joined.run(code, 3, folder)
    assert [one.returncode for one in done] == [0, 0, 0], done


@group()
def what_one_failure_does_to_the_others_is_not_the_reason(folder):
    """A collective fails at once where a process has gone, before the message about it was read."""
    act = """
def act():
    from jax.experimental import multihost_utils
    multihost_utils.process_allgather(index)
    if index == 2:
        raise UserError("page 7 cannot be read")
    multihost_utils.process_allgather(index)
"""
    done = joined.run(act + PROGRAM, 3, folder)
    assert [one.returncode for one in done] == [1, 1, 1], done
    assert "process 2 of 3 (" in ours(done[0].stderr)[-1] and "page 7" in ours(done[0].stderr)[-1]


def test_groups(tmp_path):
    """Two at a time: most of their time is spent waiting."""
    with ThreadPoolExecutor(2) as pool:
        running = {}
        for name, check in GROUPS.items():
            (tmp_path / name).mkdir()
            running[pool.submit(check, tmp_path / name)] = name
    errors = {name: one.exception() for one, name in running.items() if one.exception()}
    assert len(GROUPS) == 13
    if errors:
        raise ExceptionGroup(", ".join(errors), list(errors.values()))


def test_a_config_that_is_wrong_on_one_host_is_told_by_the_main_one(tmp_path):
    """Though it is read before the processes join."""
    config = tmp_path / "config.py"
    config.write_text("""
import os
from alignvlm_jax.configs import demo

def get_config():
    config = demo.get_config()
    config.stages = {}
    config.train.num_steps = -1 if os.environ["ALIGNVLM_PROCESS_ID"] == "1" else 1
    return config
""")
    command = f"""
from alignvlm_jax import __main__ as program
program.leave_with(program.main(["train", "--config={config}", "--workdir={tmp_path}/run"]))
"""
    began = time.monotonic()
    done = joined.run(command, 2, tmp_path)
    assert [one.returncode for one in done] == [1, 1], done
    assert (
        "config.train.num_steps is -1" in ours(done[0].stderr)[-1] and time.monotonic() - began < 50
    )


def test_one_that_fails_ends_with_its_own_status_also_where_nobody_can_be_told(monkeypatch):
    def say(name, value):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")

    monkeypatch.setattr(exchange, "say", lambda name, value: None)
    monkeypatch.setattr(peers.Watch, "_watch", lambda self: None)
    watch = peers.Watch()
    monkeypatch.setattr(exchange, "say", say)
    monkeypatch.setattr(exchange, "announced", lambda folder: say(folder, None))
    assert watch.fail("no space", 1) == 1


def test_one_that_another_ends_ends_also_where_the_service_goes_meanwhile(monkeypatch):
    """The main process leaves after a while, whether or not all have heard it."""
    told = {"failed": {"0": {"message": "no space", "status": 1}}}
    ended = []

    def announced(folder):
        if folder == "host":
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
        return told.get(folder, {})

    monkeypatch.setattr(exchange, "say", lambda name, value: None)
    monkeypatch.setattr(exchange, "announced", announced)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(peers, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(peers, "_write_out", lambda: None)
    monkeypatch.setattr(peers.os, "_exit", lambda status: (ended.append(status), sys.exit()))
    watch = peers.Watch()
    watch._thread.join(5)
    assert ended == [1]
