"""Files that grow: whole pieces, and soon."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from alignvlm_jax import storage
from alignvlm_jax.storage import bucket as bucket_lib
from alignvlm_jax.storage import bucket_requests


def test_pieces_follow_each_other_over_several_openings(folder):
    for i in range(3):
        appender = storage.Appender(folder / "x")
        appender.append(b"%d\n" % i)
        appender.append(b"-\n")
        appender.close()
        appender.close()
    assert (folder / "x").read_bytes() == b"0\n-\n1\n-\n2\n-\n"
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_what_was_synced_can_be_read(folder):
    appender = storage.Appender(folder / "x")
    for i in range(3):
        appender.append(b"%d" % i)
        storage.sync_all()
        assert (folder / "x").read_bytes() == b"012"[: i + 1]
    appender.close()


def test_a_bucket_gets_it_without_being_told_to(bucket_folder):
    appender = storage.Appender(bucket_folder / "x", every=1.0)
    appender.append(b"1")
    assert not (bucket_folder / "x").exists()
    time.sleep(1.5)
    assert (bucket_folder / "x").read_bytes() == b"1"
    appender.close()


def test_it_is_every_minute_at_least():
    assert storage.appending.EVERY_SECONDS < 60


def test_writing_costs_what_is_written(bucket, bucket_folder):
    """Not what is there already, again and again."""
    appender = storage.Appender(bucket_folder / "x")
    sent = []
    original = bucket_lib.put

    def counting(name, content, generation=None):
        sent.append(len(content))
        return original(name, content, generation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket_lib, "put", counting)
        for _ in range(50):
            appender.append(b"x" * 1000)
            appender.sync()
    appender.close()
    assert len((bucket_folder / "x").read_bytes()) == sum(sent) == 50_000


def test_faults_neither_lose_nor_repeat(bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr(bucket_requests, "MAX_PAUSE", 0.2)
    appender = storage.Appender(bucket_folder / "x")
    with bucket.faulty(error_rate=0.1, lost_rate=0.1, cut_rate=0.2, seed=3), storage.patience(60):
        for i in range(30):
            appender.append(b"%d\n" % i)
            appender.sync()
        appender.close()
    assert (bucket_folder / "x").read_text().splitlines() == [str(i) for i in range(30)]
    assert bucket.requests["faults"] > 10


def test_what_failed_in_the_background_is_told_at_the_next_call(bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr(bucket_requests, "_patience", 0.2)
    appender = storage.Appender(bucket_folder / "x", every=0.4)
    with bucket.faulty(status=403):
        appender.append(b"1")
        time.sleep(1.5)
    with pytest.raises(PermissionError, match="no permission"):
        appender.append(b"2")
    with pytest.raises(PermissionError):
        appender.close()


def test_two_that_append_to_one_object_are_told(bucket_folder):
    one, other = (storage.Appender(bucket_folder / "x") for _ in range(2))
    one.append(b"1")
    one.sync()
    other.append(b"22")
    with pytest.raises(OSError, match="another process writes it too"):
        other.sync()
    one.close()


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    appender = storage.Appender(tmp_path / "x")
    appender.append(b"1")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        appender.sync()


PROGRAM = """
import itertools, os, sys, time
from alignvlm_jax import storage
appender = storage.Appender(storage.path(sys.argv[1]) / "x", every=1.0)
for i in itertools.count():
    appender.append(f"{i} {time.time()}\\n".encode())
    if i == 1:
        print("began", flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("seconds", [0.3, 1.1, 1.7, 2.6])
def test_a_kill_takes_the_last_moment_and_leaves_whole_lines(folder, seconds):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    killed = time.time()
    process.wait()
    text = (folder / "x").read_text() if (folder / "x").exists() else ""
    lines = text.splitlines()
    assert text == "" or text.endswith("\n")
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))
    if lines:
        assert killed - float(lines[-1].split()[1]) < 5
    else:
        assert seconds < 2.5
