"""Start-up of several processes: what is said where the environment is wrong.

Real processes: tests of the launcher.
"""

import jax
import pytest

from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.parallel import distributed, exchange

COMPLETE = {
    "ALIGNVLM_COORDINATOR": "127.0.0.1:1234",
    "ALIGNVLM_NUM_PROCESSES": "2",
    "ALIGNVLM_PROCESS_ID": "0",
}


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize is called with, in an environment without our variables."""
    for name in (*COMPLETE, "ALIGNVLM_AUTO_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append(args))
    return calls


def set_environment(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_one_process_needs_nothing(calls):
    distributed.initialize()
    exchange.barrier()
    assert calls == [] and distributed.is_main()


def test_all_set(calls, monkeypatch):
    set_environment(monkeypatch, **COMPLETE)
    distributed.initialize()
    assert calls == [("127.0.0.1:1234", 2, 0)]


@pytest.mark.parametrize("missing", COMPLETE)
def test_missing_variable_is_named(calls, monkeypatch, missing):
    set_environment(
        monkeypatch, **{name: value for name, value in COMPLETE.items() if name != missing}
    )
    with pytest.raises(UserError, match=f"^{missing} not set"):
        distributed.initialize()
    assert calls == []


@pytest.mark.parametrize(
    ("name", "value"), [("NUM_PROCESSES", "two"), ("PROCESS_ID", "2"), ("PROCESS_ID", "-1")]
)
def test_wrong_number_is_named(calls, monkeypatch, name, value):
    set_environment(monkeypatch, **{**COMPLETE, f"ALIGNVLM_{name}": value})
    with pytest.raises(UserError, match=f"ALIGNVLM_{name} .*{value}"):
        distributed.initialize()
    assert calls == []


def test_others_do_not_come(monkeypatch, calls):
    def too_late(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nmore")

    set_environment(monkeypatch, **COMPLETE)
    monkeypatch.setattr(jax.distributed, "initialize", too_late)
    with pytest.raises(
        TryAgainError,
        match=r"process 0 of 2 waited 60 s at 127.0.0.1:1234 .*Barrier timed out\.\)$",
    ):
        distributed.initialize()


def test_hosts_of_a_slice_find_each_other(calls, monkeypatch):
    set_environment(monkeypatch, ALIGNVLM_AUTO_DISTRIBUTED="1")
    distributed.initialize()
    assert calls == [()]


def test_no_slice(monkeypatch, calls):
    def alone(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.\nmore")

    set_environment(monkeypatch, ALIGNVLM_AUTO_DISTRIBUTED="1")
    monkeypatch.setattr(jax.distributed, "initialize", alone)
    with pytest.raises(
        UserError,
        match=r"ALIGNVLM_AUTO_DISTRIBUTED is 1, .*coordinator_address should be defined\.\)$",
    ):
        distributed.initialize()


def test_hosts_of_a_slice_that_do_not_all_come_may_come_the_next_time(monkeypatch, calls):
    def too_late(*args, **kwargs):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nmore")

    set_environment(monkeypatch, ALIGNVLM_AUTO_DISTRIBUTED="1")
    monkeypatch.setattr(jax.distributed, "initialize", too_late)
    with pytest.raises(
        TryAgainError, match=r"did not all come \(DEADLINE_EXCEEDED: Barrier timed out\.\)$"
    ):
        distributed.initialize()
