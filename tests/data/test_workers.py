import os
import signal
import time

import pytest

from alignvlm_jax.data import workers
from alignvlm_jax.errors import UserError


def count(limit):
    yield from range(limit)


def misbehave(how):
    yield how
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wrong input":
        raise UserError("wrong input, in one line")
    if how == "a fault":
        raise ZeroDivisionError
    time.sleep(60)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_all_that_is_yielded_comes(num_workers):
    assert sorted(workers.run(count, [3, 0, 2, 1], num_workers)) == [0, 0, 0, 1, 1, 2]
    assert list(workers.run(count, [], num_workers)) == []


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("killed", UserError, "killed by SIGKILL .*fewer --num_workers.*goes on"),
        ("wrong input", UserError, "^wrong input, in one line$"),
        ("a fault", RuntimeError, "(?s)in a worker:.*misbehave.*ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_in_a_worker_ends_all_at_once(how, error, message):
    started = time.monotonic()
    with pytest.raises(error, match=message):
        list(workers.run(misbehave, ["sleep", how, "sleep"], 2))
    assert time.monotonic() - started < 40


def test_workers_end_with_the_iteration():
    running = workers.run(misbehave, ["sleep", "sleep"], 2)
    assert next(running) == "sleep"
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 30
