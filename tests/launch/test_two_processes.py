"""Two real processes, started by `launch/local.sh` and joined by jax.distributed.

Pods of other shapes: tests/pod.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import fast_xla
from tests.pod import workload

REPOSITORY = Path(__file__).parents[2]


def run(arguments: list[str], num_processes: int, logs: Path) -> None:
    """Runs the program on four devices."""
    environment = {"PYTHON": sys.executable, "LOGS": str(logs)}
    fast = f"--env=XLA_FLAGS={fast_xla.FLAGS}"
    command = [
        str(REPOSITORY / "launch" / "local.sh"),
        fast,
        str(num_processes),
        str(4 // num_processes),
    ]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_train_and_evaluate(tmp_path):
    """Each has two devices and reads half of every batch; one of them writes. That they count as
    one process does is what tests/pod compares."""
    config = workload.write(tmp_path)
    workdir = tmp_path / "run"
    logs = tmp_path / "logs"
    run(workload.train(config, workdir, (2, 2, 1)), 2, logs)
    logged = lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in logged if "loss" in line] == list(
        range(1, workload.NUM_STEPS + 1)
    )
    assert [line["step"] for line in logged if "validation/answer_loss" in line] == [2, 4]
    assert [line["step"] for line in logged if "generated/anls" in line] == [4]
    # A second call finds that all is done; of an evaluation the main process tells the other that
    # all is answered.
    run(workload.train(config, workdir, (2, 2, 1)), 2, logs)
    assert lines(workdir / "metrics.jsonl") == logged
    evaluate = ["evaluate", f"--checkpoint={workdir}"]
    run(evaluate, 2, logs)
    predictions = workdir / "predictions"
    for file in ("validation.jsonl", "validation_blind.jsonl"):
        answered = lines(predictions / file)[1:]
        assert len(answered) == len({row["id"] for row in answered}) == 23
        assert any(row["prediction"] for row in answered)
    before = (predictions / "validation.jsonl").stat().st_mtime_ns
    run(evaluate, 2, logs)
    assert (predictions / "validation.jsonl").stat().st_mtime_ns == before
