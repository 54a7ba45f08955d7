"""Who may write in a folder, on this machine and in a bucket."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import bucket as bucket_lib
from alignvlm_jax.storage import bucket_requests, lease

HOLDER = """
import sys, time
from alignvlm_jax import storage
from alignvlm_jax.storage import lease
lease.TTL_SECONDS, lease.MARGIN_SECONDS, lease.POLL_SECONDS = 4.0, 0.5, 0.2
if "another" in sys.argv:
    lease._machine = lambda: "another machine"
with lease.hold(storage.path(sys.argv[1]) / ".lock", "is training in", print):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 4.0)
    monkeypatch.setattr(lease, "MARGIN_SECONDS", 0.5)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.2)


@pytest.fixture
def holder():
    """Starts processes that hold a folder."""
    started = []

    def start(folder, *args: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), *args], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def hold(folder, say=print):
    return lease.hold(folder / ".lock", "is training in", say)


def test_it_is_held_by_one_and_free_afterwards(folder):
    for _ in range(2):
        with hold(folder):
            with pytest.raises(
                UserError, match=rf"process {os.getpid()} on .* \(since .* UTC\) is training in"
            ):
                hold(folder).__enter__()
            (folder / "x").write_text("x")


def test_another_process_is_named_and_refused(folder, holder):
    other = holder(folder)
    began = time.monotonic()
    with pytest.raises(
        UserError, match=rf"process {other.pid} on .* is training in .*; wait for it$"
    ):
        hold(folder).__enter__()
    assert time.monotonic() - began < 20


def test_after_a_kill_on_this_machine_it_is_free_at_once(folder, holder):
    other = holder(folder)
    other.send_signal(signal.SIGKILL)
    other.wait()
    said = []
    with hold(folder, said.append):
        assert said == []


def test_after_a_kill_elsewhere_it_is_waited_for(bucket_folder, holder):
    other = holder(bucket_folder, "another")
    other.send_signal(signal.SIGKILL)
    other.wait()
    said = []
    began = time.monotonic()
    with hold(bucket_folder, said.append):
        assert 1 < time.monotonic() - began < lease.TTL_SECONDS + 15
        (bucket_folder / "x").write_text("x")
    assert (
        len(said) == 1
        and f"process {other.pid} on" in said[0]
        and "waiting until its lease expires" in said[0]
    )


def test_the_clock_of_the_host_does_not_matter(bucket_folder, holder, monkeypatch):
    """A holder that lives is not robbed by a host whose clock is a day ahead, nor waited for by one
    a day behind."""
    holder(bucket_folder, "another")
    now = time.time
    for offset in (86_400, -86_400):
        monkeypatch.setattr(time, "time", lambda offset=offset: now() + offset)
        with pytest.raises(UserError, match="has renewed its lease just now"):
            hold(bucket_folder).__enter__()


def test_it_is_given_back_by_a_process_that_ends_at_once(bucket_folder):
    held = hold(bucket_folder)
    held.__enter__()
    storage.close_all()
    assert not (bucket_folder / ".lock").exists()
    held.__exit__(None, None, None)


def test_it_is_renewed(bucket_folder):
    with hold(bucket_folder):
        for _ in range(7):
            time.sleep(1)
            (bucket_folder / "x").write_text("x")
        with pytest.raises(UserError, match="is training in"):
            hold(bucket_folder).__enter__()


def test_who_lost_it_writes_nothing_more(bucket, bucket_folder):
    """Paused for longer than a lease lasts, while another takes it."""
    with hold(bucket_folder):
        storage.write_whole(bucket_folder / "x", "ours")
        name = bucket_lib.name_of(bucket_folder / ".lock").partition("/")[2]
        bucket.put(
            name,
            json.dumps({"token": "theirs", "pid": 7, "host": "other", "since": "now"}).encode(),
        )
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            time.sleep(0.2)
            try:
                storage.check_held(bucket_folder / "checkpoints")
            except UserError:
                break
        for write in (
            lambda: storage.write_whole(bucket_folder / "x", "late"),
            lambda: (bucket_folder / "y").write_text("late"),
            lambda: (bucket_folder / "x").unlink(),
            lambda: storage.remove_tree(bucket_folder),
        ):
            with pytest.raises(
                UserError,
                match=r"was lost: process 7 on other .* has taken it; nothing more is written",
            ):
                write()
        assert (bucket_folder / "x").read_text() == "ours"
        storage.write_whole(bucket_folder.parent / "elsewhere", "x")
    assert "theirs" in (bucket_folder / ".lock").read_text()


def test_what_cannot_be_renewed_stops_writing_before_it_expires(bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr(bucket_requests, "_patience", 0.5)
    with hold(bucket_folder):
        with bucket.faulty(status=503, names=r"\.lock"):
            time.sleep(lease.TTL_SECONDS)
            with pytest.raises(OSError, match="could not be renewed for"):
                storage.write_whole(bucket_folder / "x", "late")
        assert not (bucket_folder / "x").exists()
        time.sleep(lease.TTL_SECONDS / 2)
        storage.write_whole(bucket_folder / "x", "nobody took it")


def test_many_at_once_one_gets_it(bucket, bucket_folder):
    got = []
    refused = []
    done = threading.Event()

    def contend(i: int) -> None:
        try:
            with hold(bucket_folder, lambda message: None):
                got.append(i)
                done.wait(20)
        except UserError:
            refused.append(i)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.1)
    deadline = time.monotonic() + 15
    while len(refused) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    done.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"pid": "x"}'])
def test_a_damaged_lease_is_one_of_another_process(bucket_folder, content):
    """It expires like any other."""
    storage.write_whole(bucket_folder / ".lock", content)
    said = []
    with hold(bucket_folder, said.append):
        assert "another process held" in said[0]
