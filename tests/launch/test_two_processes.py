"""Two real processes, started by `launch/local.sh` and joined by jax.distributed. Pods of other shapes: tests/pod."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pod import workload

REPOSITORY = Path(__file__).parents[2]
NUMBERS = {"loss", "answer_loss", "patch_loss", "grad_norm", "validation/answer_loss", "generated/anls"}


def run(arguments: list[str], num_processes: int, logs: Path) -> None:
    """Runs the program on four devices."""
    environment = {"PYTHON": sys.executable, "LOGS": str(logs)}
    # Most of the time is XLA's, which need not do its best.
    fast = "--env=XLA_FLAGS=--xla_backend_optimization_level=0"
    command = [str(REPOSITORY / "launch" / "local.sh"), fast, str(num_processes), str(4 // num_processes)]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """Each has two devices and reads half of every batch; one of them writes."""
    config = workload.write(tmp_path)
    for count, name in ((2, "two"), (1, "one")):
        run(workload.train(config, tmp_path / name, (2, 2, 1)), count, tmp_path / "logs")
    two, one = (lines(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [line["step"] for line in two if "loss" in line] == list(range(1, workload.NUM_STEPS + 1))
    assert [line.keys() for line in two] == [line.keys() for line in one]
    for ours, theirs in zip(two, one, strict=True):
        for name in theirs.keys() & NUMBERS:
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5, rel=2e-5), name
    assert any("generated/anls" in line for line in one)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    for count, name in ((2, "one"), (1, "other")):
        run(["evaluate", f"--checkpoint={tmp_path / name}"], count, tmp_path / "logs")
    for file in ("validation.jsonl", "validation_blind.jsonl"):
        ours, theirs = (lines(tmp_path / name / "predictions" / file)[1:] for name in ("one", "other"))
        assert ours == theirs and len(ours) == 23 and any(row["prediction"] for row in ours)
    # Of a second call the main process tells the other that all is answered.
    before = (tmp_path / "one" / "predictions" / "validation.jsonl").stat().st_mtime_ns
    run(["evaluate", f"--checkpoint={tmp_path / 'one'}"], 2, tmp_path / "logs")
    assert (tmp_path / "one" / "predictions" / "validation.jsonl").stat().st_mtime_ns == before
