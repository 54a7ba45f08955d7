import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import executors


def count(limit):
    yield from range(limit)


def misbehave(how):
    yield how
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wrong input":
        raise UserError("wrong input, in one line")
    if how == "a full disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if how == "a fault":
        raise ZeroDivisionError
    time.sleep(60)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_that_is_yielded_comes(num_workers):
    assert sorted(executors.run(count, [3, 0, 2, 1], num_workers)) == [0, 0, 0, 1, 1, 2]
    assert list(executors.run(count, [], num_workers)) == []


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("killed", UserError, "killed by SIGKILL .*fewer --num_workers.*goes on"),
        ("wrong input", UserError, "^wrong input, in one line$"),
        ("a full disk", OSError, "No space left on device"),
        ("a fault", RuntimeError, "(?s)in a worker:.*misbehave.*ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_in_a_worker_ends_all_at_once(how, error, message):
    started = time.monotonic()
    with pytest.raises(error, match=message):
        list(executors.run(misbehave, ["sleep", how, "sleep"], 2))
    assert time.monotonic() - started < 40


def test_workers_end_with_the_iteration():
    running = executors.run(misbehave, ["sleep", "sleep"], 2)
    assert next(running) == "sleep"
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 30


ORPHANS = """
import os
from tests.ingest.test_executors import talk
from alignvlm_jax.ingest import executors
if __name__ == "__main__":
    running = executors.run(talk, range(2), 2)
    next(running)
    os._exit(0)  # as a parent that is killed: it ends none of them
"""


def talk(_):
    while True:
        time.sleep(0.05)
        yield "still here"


def test_workers_whose_parent_is_gone_end_without_a_word(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    run = subprocess.run(
        [sys.executable, tmp_path / "orphans.py"],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,  # until the last of them has ended
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")
