"""Seconds from the start of `train` to its first step: anew, and killed and started again with and
without what was compiled before.

    python -m tests.bench.restarts [trials] [flags of train]

It trains configs/demo.py on data/demo (see `make demo`).
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import machine
from tests.pod.slices import REPOSITORY

FLAGS = ["--config=configs/demo.py", "--config.data.dir=data/demo"]
EVERY = ["--config.train.log_every=1", "--config.train.checkpoint_every=2"]


def main(num_trials: int, flags: list[str]) -> None:
    """Prints the lines that docs/results.md shows."""
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name) / "run"
        seconds: dict[str, list[float]] = {
            "anew": [],
            "again": [],
            "again, without what was compiled": [],
        }
        for _ in range(num_trials):
            shutil.rmtree(workdir, ignore_errors=True)
            for what in seconds:
                if what.endswith("compiled"):
                    shutil.rmtree(workdir / "compiled")
                seconds[what].append(_first_step(workdir, flags))
        for what, times in seconds.items():
            each = ", ".join(f"{one:.1f}" for one in times)
            print(f"{what}: {statistics.median(times):.1f} s to the first step ({each})")
        ratio = statistics.median(seconds["again"]) / statistics.median(
            seconds["again, without what was compiled"]
        )
        print(f"with what was compiled / without: {ratio:.2f}")


def _first_step(workdir: Path, flags: list[str]) -> float:
    """Starts training, kills it once it has saved, and returns when its first step was logged."""
    metrics = workdir / "metrics.jsonl"
    checkpoints = workdir / "checkpoints"
    saved = _saved(checkpoints)
    if metrics.exists():  # As the run itself would do it, but later than it is looked at here.
        kept = [
            line for line in metrics.read_text().splitlines(keepends=True) if _step(line) <= saved
        ]
        metrics.write_text("".join(kept))
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "alignvlm_jax",
        "train",
        f"--workdir={workdir}",
        *FLAGS,
        *EVERY,
        *flags,
    ]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        first = None
        while process.poll() is None and (first is None or _saved(checkpoints) <= saved):
            if first is None and _newest(metrics) > saved:
                first = time.monotonic() - began
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if first is None:
            out.seek(0)
            raise SystemExit(out.read().decode())
    return first


def _saved(folder: Path) -> int:
    whole = [
        int(path.parent.name)
        for path in folder.glob("*/commit_success.txt")
        if path.parent.name.isdigit()
    ]
    return max(whole, default=0)


def _newest(metrics: Path) -> int:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max(
        (_step(line) for line in lines if line.endswith("\n") and "learning_rate" in line),
        default=0,
    )


def _step(line: str) -> float:
    return json.loads(line)["step"] if line.endswith("\n") else math.inf


if __name__ == "__main__":
    with machine.watched():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:])
