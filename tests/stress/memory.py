"""Memory, threads and open files of a run of 20,000 steps."""

import random
import time
from pathlib import Path

from tests.stress import setting, workdirs, workload
from tests.stress.setting import Setting
from tests.stress.workdirs import Wrong

NUM_STEPS = 20_000
FIRST = 2_000
MORE_MIB = 8
FLAGS = (
    "--config.train.log_every=50", "--config.train.checkpoint_every=500",
    "--config.train.validate_every=1000", "--config.train.generate_every=2000", "--config.train.batch_size=2",
    "--config.train.validation_sequences=4", "--config.train.generate_questions=2",
)  # fmt: skip


def flat(shared: Setting, number: int, rng: random.Random, scratch: Path) -> dict:
    """One run of one stage; what it holds at step 2,000 and at the end."""
    config = workload.write_one_stage(scratch / "config.py", str(shared.out / "data"), NUM_STEPS)
    with setting.local(shared, scratch) as trial:
        trial.config = config
        attempt = shared.train(trial, 1, *FLAGS, STRESS_QUIET="1")
        samples: list[tuple[int, float, int, int]] = []
        try:
            while attempt.is_running():
                found = (
                    workdirs.lines(trial.workdir)
                    if samples or (trial.scratch / "run").exists()
                    else []
                )
                step = max((line["step"] for line in found), default=0)
                if step >= FIRST and (not samples or step >= samples[-1][0] + 500):
                    samples.append((step, *held(attempt.processes[0].pid)))
                time.sleep(1.0)
            [status] = attempt.wait()
        finally:
            attempt.kill()
        if status:
            raise Wrong(f"it ended with {status}: {attempt.errors() or attempt.printed()[-300:]}")
    first = samples[0]
    last = samples[-1]
    # Of a few samples the least: a save or an answer under way holds more for a moment.
    early, late = (min(one[1] for one in part) for part in (samples[:4], samples[-4:]))
    threads, files = (
        [min(one[i] for one in part) for part in (samples[:4], samples[-4:])] for i in (2, 3)
    )
    noted = (
        f"{early:.0f} MiB at step {first[0]:,}, {late:.0f} at {last[0]:,}; threads {threads}, "
        f"files {files}"
    )
    if late - early > MORE_MIB or threads[1] > threads[0] + 1 or files[1] > files[0] + 1:
        raise Wrong(f"it grows: {noted}")
    return {"told": {noted: 1}}


def held(pid: int) -> tuple[float, int, int]:
    """Returns a process's resident memory in MiB, its threads and its open files."""
    process = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return (
        int(status["VmRSS"].split()[0]) / 1024,
        int(status["Threads"]),
        len(list((process / "fd").iterdir())),
    )
