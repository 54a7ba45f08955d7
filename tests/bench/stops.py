"""Seconds from SIGTERM, at one host of two, to the start of the save, where steps are long.

python -m tests.bench.stops [trials]          (two processes on this machine; a minute a trial)
"""

import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.bench import machine
from tests.stress import runs, workload

SIZES = {
    "width": 512,
    "mlp_width": 2048,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 128,
}
FLAGS = [
    "--config.init_from=",
    "--config.train.batch_size=32",
    "--config.train.validate_every=1000",
    "--config.train.checkpoint_every=1000",
    *(f"--config.model.llm.{name}={size}" for name, size in SIZES.items()),
]
NUM_STEPS = 1000


def main(num_trials: int) -> None:
    """Prints the lines that docs/results.md shows."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write(folder / "data")
        config = workload.write_one_stage(folder / "config.py", str(folder / "data"), NUM_STEPS)
        arguments = ["train", f"--config={config}", f"--workdir={folder / 'run'}", *FLAGS]
        for trial in range(num_trials):
            attempt = runs.start(folder / "attempts", arguments, num_processes=2)
            fetched = _fetched(attempt, 4)
            step = float(np.median(np.diff(fetched[1:])))
            time.sleep(step * rng.random())
            sent = time.time()
            attempt.send(signal.SIGTERM, [trial % 2])
            statuses = attempt.wait()
            assert statuses == [143, 143], (statuses, attempt.printed())
            # The last one: a run saves nothing else here.
            save = [event["time"] for event in attempt.told() if event.get("phase") == "saving"][-2]
            print(
                f"steps of {step:.1f} s, SIGTERM at process {trial % 2} alone: {save - sent:.1f} "
                f"s to the save, {(save - sent) / step:.2f} steps; {time.time() - sent:.1f} s to "
                "the end of both",
                flush=True,
            )


def _fetched(attempt: runs.Attempt, count: int) -> list[float]:
    """Returns when batches came to the main process, once so many have: one at each step, but for
    the first two."""
    while attempt.is_running():
        times = [event["time"] for event in attempt.told() if "digest" in event]
        if len(times) >= count:
            return times
        time.sleep(runs.TICK)
    raise SystemExit(attempt.printed())


if __name__ == "__main__":
    with machine.watched():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
