"""Whether a stop leaves time to save, against the launch scripts' own numbers, and what a lost host
costs."""

import re
from pathlib import Path

import pytest

from alignvlm_jax.config import TrainConfig
from alignvlm_jax.plan import stopping
from alignvlm_jax.plan.stopping import GRACE_SECONDS, HOST_WRITE_GB

LAUNCH = Path(__file__).parents[2] / "launch"
SLOW = TrainConfig(checkpoint_every=500, checkpoint_minutes=15)


def test_by_hand():
    """8 GB a host at half a GB a second, steps of 14 s: the 65th is the first that ends after 15
    minutes."""
    stop = stopping.make(SLOW, state_gib=128e9 / 2**30, num_hosts=16, step_seconds=14)
    assert stop.save == pytest.approx(16) and stop.needed == pytest.approx(30)
    assert stop.interval == 65 * 14
    assert stop.lost_on_average == pytest.approx(
        65 * 7 + 16
    ) and stop.lost_at_most == pytest.approx(65 * 14 + 16)
    assert all(stop.in_time.values())


@pytest.mark.parametrize(
    ("minutes", "every", "steps"), [(0, 500, 500), (15, 10, 10), (0.01, 500, 1)]
)
def test_interval(minutes, every, steps):
    """By steps alone, by steps that come first, by steps longer than the minutes."""
    train = TrainConfig(checkpoint_every=every, checkpoint_minutes=minutes)
    assert stopping.make(train, 1.0, 1, step_seconds=20).interval == steps * 20


def test_too_late_is_said_with_the_grace_to_ask_for():
    short = stopping.make(SLOW, state_gib=100e9 / 2**30, num_hosts=4, step_seconds=15)
    text = "\n".join(stopping.lines(short))
    assert (
        "need 65 s: in time for GKE JobSet, xpk, TPU VM, Slurm (600 s); TOO LATE for spot notice "
        "(30 s)" in text
    )
    assert "--grace" not in text and f"assumed {HOST_WRITE_GB} GB/s a host" in text
    long = stopping.make(SLOW, state_gib=1200e9 / 2**30, num_hosts=4, step_seconds=15)
    assert "need 615 s: TOO LATE for GKE" in stopping.lines(long)[1] and stopping.lines(long)[
        1
    ].endswith("--grace=738")


def test_the_launch_scripts_give_what_is_counted_on():
    stated = re.search(r"^default_grace=(\d+)$", (LAUNCH / "common.sh").read_text(), re.MULTILINE)
    for name, seconds in GRACE_SECONDS.items():
        assert seconds == (30 if name == "spot notice" else int(stated[1])), name
    for script in ("gke_jobset.sh", "xpk.sh", "tpu_vm.sh", "slurm_gpu.sh"):
        assert "grace=$default_grace" in (LAUNCH / script).read_text(), script
