"""Two runs in one workdir."""

import random
import time
from pathlib import Path

from tests.stress import setting
from tests.stress.runs import Hang
from tests.stress.setting import Setting
from tests.stress.workdirs import Wrong

PHASES = ("restoring", "training", "saving", "validating", "stage change")
REFUSED_SECONDS = 90
"""In a bucket the second waits for a renewal of the lease, which comes every 15 s."""


def second(
    shared: Setting, number: int, rng: random.Random, scratch: Path, of_bucket: bool
) -> dict:
    """One run in whose workdir another is started; the other is refused, and the one unharmed."""
    num_processes = 1 + number % 2
    reference = shared.reference(num_processes)
    with setting.place(shared, scratch, rng, of_bucket) as trial:
        # In a bucket the first must still be there at its next renewal.
        slow = {"STRESS_SLOW": "2" if of_bucket else "0.5"}
        first = shared.train(trial, num_processes, **slow)
        try:
            if not first.await_phase(rng.choice(PHASES), 1):
                raise Wrong(f"the first ended: {first.printed()[-300:]}")
            began = time.monotonic()
            other = shared.train(trial, 1)
            try:
                [status] = other.wait(REFUSED_SECONDS * 3)
            finally:
                other.kill()
            seconds = round(time.monotonic() - began, 1)
            if not first.is_running():
                raise Hang("the first had ended by the time the second was refused: no trial")
            statuses = first.wait()
        finally:
            first.kill()
        errors = other.errors()
        if status != 1 or len(errors) != 1 or "is training in" not in errors[0]:
            raise Wrong(f"the second ended with {status}: {errors or other.printed()[-300:]}")
        if any(statuses):
            raise Wrong(f"the first ended with {statuses}: {first.errors()}")
        setting.check_done(trial, reference)
    return {"longest": {"seconds until refused": seconds}}
