"""One run that goes on on other numbers of processes, meshes and orders of devices, again and
again."""

import random
import signal
from pathlib import Path

from tests.pod import workload as pod_workload
from tests.stress import runs, setting, workdirs, workload
from tests.stress.setting import Setting
from tests.stress.workdirs import Wrong

PLACES = [
    ("", 1, (1, 2, 1)),
    ("", 2, (2, 1, 1)),
    ("", 2, (1, 1, 2)),
    ("v5e:2x4", 1, (2, 2, 2)),
    ("v5e:2x4", 2, (1, 4, 2)),
    ("v5e:2x4", 2, (4, 1, 2)),
    ("v5e:2x4", 4, (2, 4, 1)),
    ("v5e:2x4", 4, (1, 2, 4)),
    ("2xv5e:2x2", 2, (2, 2, 2)),
    ("v5p:2x2x2", 4, (1, 8, 1)),
]
"""Slices whose order of devices is copied, processes, and the sizes of data, fsdp and tensor."""
TOLERANCE = 1e-5
COUNTED = (
    "step",
    "epoch",
    "records/",
    "tokens/",
    "packing_efficiency",
    "tile_efficiency",
    "skipped",
    "learning_rate",
)
"""Names that begin so are to be equal."""
NOT_SUMMED = ("unsupervised_records",)
"""Of one process's own rows."""


def chain(shared: Setting, number: int, rng: random.Random, scratch: Path) -> dict:
    """One run in three places, one after the other, held against the undisturbed run on one
    process."""
    reference = shared.reference(1)
    places = [PLACES[(3 * number + i) % len(PLACES)] for i in range(3)]
    rng.shuffle(places)
    with setting.local(shared, scratch) as trial:
        for place in places:
            newest = workdirs.newest(trial.workdir)
            of_slice, num_processes, mesh = place
            attempt = shared.train(
                trial, num_processes, *pod_workload.mesh_flags(mesh), of_slice=of_slice
            )
            try:
                if place is not places[-1] and attempt.await_phase("saving", rng.choice([2, 3, 4])):
                    attempt.send(signal.SIGTERM, runs.victims(rng, num_processes))
                statuses = attempt.wait()
            finally:
                attempt.kill()
            if set(statuses) - {0, 143}:
                raise Wrong(f"on {place}: ended with {statuses}: {attempt.printed()[-300:]}")
            setting.check_went_on(trial, attempt, newest)
        found = workdirs.lines(trial.workdir)
        furthest = _compare(found, reference.lines)
        if workdirs.newest(trial.workdir) != workload.TOTAL:
            raise Wrong(f"it ended at step {workdirs.newest(trial.workdir)}")
    return {"faults": 2, "longest": {"difference of a loss": float(f"{furthest:.2g}")}}


def _compare(found: list[dict], expected: list[dict]) -> float:
    """Returns the largest relative difference of a loss; Wrong for what is too far off."""
    furthest = 0.0
    if [list(line) for line in found] != [list(line) for line in expected]:
        raise Wrong(f"metrics.jsonl has other lines: {len(found)}, not {len(expected)}")
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if name in NOT_SUMMED:
                continue
            if name.startswith(COUNTED) or not isinstance(value, int | float):
                if ours[name] != value:
                    raise Wrong(f"step {ours['step']}: {name} is {ours[name]}, not {value}")
                continue
            difference = abs(ours[name] - value) / max(1.0, abs(value))
            if name.endswith("loss"):
                furthest = max(furthest, difference)
            if name.endswith("loss") and difference > TOLERANCE:
                raise Wrong(f"step {ours['step']}: {name} is {ours[name]}, not {value}")
    return furthest
