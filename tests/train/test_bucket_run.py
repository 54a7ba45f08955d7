"""Whole runs with their workdir in a bucket, against the same on a local disk."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import lease
from alignvlm_jax.train import loop, preflight
from tests.train import fake_run
from tests.train.fake_run import TOTAL, Batches, send
from tests.train.test_metrics import read_records


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run on a local disk that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight")
    fake_run.train(workdir)
    return workdir


def logged(workdir) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same_run(workdir, straight) -> None:
    assert logged(workdir) == logged(straight)
    ours = fake_run.stored(workdir)
    theirs = fake_run.stored(straight)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def test_a_run_in_a_bucket_is_that_on_a_disk(straight, bucket, bucket_folder):
    fake_run.train(bucket_folder)
    assert_same_run(bucket_folder, straight)
    names = {name.split("/")[0] for name in storage.files_below(bucket_folder)}
    assert names >= {"checkpoints", "config.json", "metrics.jsonl", "tensorboard"}
    boards = sorted((bucket_folder / "tensorboard").iterdir())
    steps = [
        Event.FromString(record).step
        for board in boards
        for record in read_records(board.read_bytes())
    ]
    assert max(steps) == TOTAL


def test_it_goes_on_after_a_stop(straight, bucket_folder):
    with pytest.raises(loop.Stopped, match="stopped at step 3"):
        fake_run.train(bucket_folder, Batches(send(signal.SIGTERM, at=4)))
    batches = Batches()
    assert "going on from" in fake_run.train(bucket_folder, batches)
    assert batches.served[0] == 4
    assert_same_run(bucket_folder, straight)


def test_it_goes_on_after_a_kill(straight, bucket_folder, capfd):
    """At once: the lease of a process of this machine that is gone is not waited for."""
    program = [sys.executable, "-m", "tests.train.fake_run", str(bucket_folder), "6"]
    assert (
        subprocess.run(program, timeout=240, stdout=subprocess.DEVNULL).returncode
        == -signal.SIGKILL
    )
    assert (bucket_folder / ".lock").exists()
    lines = logged(bucket_folder)
    # A checkpoint stands at step 4.
    assert lines == logged(straight)[: len(lines)] and len(lines) >= 3
    fake_run.train(bucket_folder)
    assert "waiting until its lease expires" not in capfd.readouterr().err
    assert_same_run(bucket_folder, straight)


def test_faults_of_the_storage_change_nothing(straight, bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr(storage.bucket_requests, "MAX_PAUSE", 0.5)
    with bucket.faulty(error_rate=0.03, lost_rate=0.02, cut_rate=0.02, seed=5):
        fake_run.train(bucket_folder)
    assert_same_run(bucket_folder, straight)


def test_two_runs_in_one_workdir_are_refused(bucket_folder, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 8.0)
    monkeypatch.setattr(lease, "MARGIN_SECONDS", 1.0)
    refused = []

    def second(step: int, batch: dict) -> None:
        if step == 2 and not refused:
            with pytest.raises(
                UserError, match=rf"process {os.getpid()} on .* is training in {bucket_folder}"
            ) as error:
                fake_run.train(bucket_folder)
            refused.append(str(error.value))

    # The second is refused before it changes anything that both would share.
    monkeypatch.setattr(preflight, "open_stages", lambda configs: [])
    fake_run.train(bucket_folder, Batches(second))
    assert len(refused) == 1


def test_a_run_that_lost_its_lease_stops(bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 2.0)
    monkeypatch.setattr(lease, "MARGIN_SECONDS", 0.5)

    def robbed(step: int, batch: dict) -> None:
        if step == 3:
            name = os.fspath(bucket_folder).removeprefix(f"{bucket.url}/")
            thief = {"token": "x", "pid": 7, "host": "elsewhere", "since": "today"}
            bucket.put(f"{name}/.lock", json.dumps(thief).encode())
            time.sleep(1.5)

    with pytest.raises(
        UserError,
        match=r"lease on .* was lost: process 7 on elsewhere .* has taken it; nothing more",
    ):
        fake_run.train(bucket_folder, Batches(robbed))
    assert "4" not in {
        name.split("/")[1] for name in storage.files_below(bucket_folder) if "checkpoints/" in name
    }
