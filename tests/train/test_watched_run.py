"""A whole run is watched: its log, heartbeat, profile, watchdog and the sums of where its time
went."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import pytest

from alignvlm_jax.errors import UserError
from alignvlm_jax.train import heartbeat, loop
from alignvlm_jax.train.goodput import CATEGORIES
from tests.train import fake_run
from tests.train.fake_run import Batches

STALLS = """
    import sys, time
    from pathlib import Path
    from alignvlm_jax.train import watch
    from tests.train import fake_run
    from tests.train.test_watched_run import one_stage

    # Compiling takes long where much else runs.
    watch.LIMITS.update(dict.fromkeys(("starting", "restoring", "compiling", "saving", "validating"), 1000))

    def never_ends(now, batch):
        if now == 4:
            time.sleep(600)

    fake_run.train(Path(sys.argv[1]), fake_run.Batches(never_ends), configs=one_stage(stall_minutes=1 / 60))
"""


def one_stage(**changes) -> tuple:
    return fake_run.stages(**({"num_steps": 4, "checkpoint_every": 2} | changes))[:1]


def goodputs(workdir: Path) -> list[dict[str, float]]:
    """Seconds by category of every line that has them; the fractions of each add up to 1."""
    found = []
    for text in (workdir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert sum(line[f"goodput/{name}"] for name in CATEGORIES) == pytest.approx(1, abs=1e-6)
        found.append(
            {name: line[f"goodput/{name}"] * line["goodput/seconds"] for name in CATEGORIES}
        )
    return found


def slow(now: int, batch: dict) -> None:
    if now == 3:
        jax.block_until_ready(jax.live_arrays())
        time.sleep(0.5)


def test_a_run_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fake_run,
        "_compile_steps",
        lambda *args, inner=fake_run._compile_steps: (time.sleep(0.3), inner(*args))[1],
    )
    printed = fake_run.train(tmp_path, Batches(slow), configs=one_stage(profile="2:4"))
    beat = heartbeat.read(tmp_path / heartbeat.FOLDER, 0)
    assert (beat["phase"], beat["step"], beat["total"]) == ("done", 4, 4)
    log = (tmp_path / "logs" / "host-0.log").read_text()
    for part in (
        "process 0 of 1",
        "commit: ",
        "mesh: data 2",
        "stage 'text': steps 1 to 4",
        "done: 4 steps",
        "orbax",
    ):
        assert part in log, part
    assert "orbax" not in printed
    session = tmp_path / "profile" / "plugins" / "profile" / "steps-2-4"
    assert (session / "host-0.xplane.pb").stat().st_size > 0
    assert f"profile of steps 2 to 3: {tmp_path}/profile" in printed
    sums = goodputs(tmp_path)
    assert len(sums) == 6  # Four steps, two validations.
    assert sums[-1]["data_wait"] >= 0.5 and sums[0]["compile"] >= 0.3
    assert sums[-1]["steps"] > 0 and sums[-1]["evaluation"] > 0 and sums[-1]["other"] > 0
    assert sums[-1]["restart"] == 0
    for before, after in itertools.pairwise(sums):
        assert all(after[name] >= before[name] - 1e-6 for name in CATEGORIES)


def test_a_step_that_hangs_ends_the_process_and_the_run_goes_on(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(STALLS), str(tmp_path)]
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    lived = time.monotonic() - began
    assert done.returncode == 75, done.stderr
    assert "in never_ends" in done.stderr and "while waiting, after step 2" in done.stderr
    beat = heartbeat.read(tmp_path / heartbeat.FOLDER, 0)
    assert (beat["phase"], beat["step"]) == ("stalled", 2)
    assert 1 < beat["run_seconds"] < lived
    assert goodputs(tmp_path)[0]["restart"] == 0
    # Neither binds the workdir.
    changed = one_stage(profile="1:3", stall_minutes=0.0)
    with pytest.raises(loop.Stopped):
        fake_run.train(tmp_path, Batches(fake_run.send(signal.SIGTERM, at=4)), configs=changed)
    assert heartbeat.read(tmp_path / heartbeat.FOLDER, 0)["phase"] == "stopped"
    batches = Batches()
    printed = fake_run.train(tmp_path, batches, configs=changed)
    assert batches.served == [4]
    assert "config.train.profile: steps up to 3 are done already; traces nothing" in printed
    assert heartbeat.read(tmp_path / heartbeat.FOLDER, 0)["phase"] == "done"
    log = (tmp_path / "logs" / "host-0.log").read_text()
    assert log.count("process 0 of 1") == 3 and "in never_ends" in log
    assert "ended by Stopped: stopped at step 3 of 4" in log and "Traceback" in log
    sums = goodputs(tmp_path)
    # All of the first process counts, also the time in which it hung, and that of the second until
    # its first step.
    assert sum(sums[-1].values()) > beat["run_seconds"]
    assert sums[-1]["restart"] > 1


def test_a_profile_beyond_the_run_is_told_before_anything_is_touched(tmp_path):
    with pytest.raises(UserError, match=r"'9:12', and the run has steps 1 to 4"):
        fake_run.train(tmp_path / "run", configs=one_stage(profile="9:12"))
    assert not (tmp_path / "run").exists()
