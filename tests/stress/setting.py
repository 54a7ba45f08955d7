"""What all trials share: data, compiled programs, and runs that nothing disturbed; and a place for
one trial."""

import contextlib
import dataclasses
import functools
import json
import random
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.fake_bucket import FakeBucket
from tests.stress import runs, workdirs, workload
from tests.stress.runs import Attempt
from tests.stress.workdirs import InBucket, Local, Workdir, Wrong

FAULTS = {"error_rate": 0.02, "lost_rate": 0.01, "cut_rate": 0.01, "latency": 0.003}
"""Of the storage, in all trials in a bucket."""
_making = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Reference:
    """An undisturbed run: its lines, arrays and batches, and the seconds that it was in each phase,
    each time."""

    lines: list[dict]
    arrays: dict[str, np.ndarray]
    batches: dict[tuple[str, int], tuple]
    checkpoints: set[int]
    seconds: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The folder of all that is shared by trials."""

    out: Path

    def prepare(self) -> None:
        """Writes the data, unless they are there."""
        if not (self.out / "data.py").exists():
            shutil.rmtree(self.out / "data", ignore_errors=True)
            workload.write(self.out / "data")

    def environment(self) -> dict[str, str]:
        """Returns what has processes share their compiled programs."""
        return {
            "JAX_COMPILATION_CACHE_DIR": str(self.out / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def reference(self, num_processes: int) -> Reference:
        """Returns the undisturbed run of so many processes on a local disk; runs it when it is
        asked for first."""
        with _making:
            return _reference(self, num_processes)

    def train(
        self,
        trial: "Trial",
        num_processes: int,
        *flags: str,
        of_slice: str = "",
        each: Sequence[Mapping[str, str]] = (),
        **environment: str,
    ) -> Attempt:
        """Starts the training of a trial, or goes on with it; `each` are variables of one
        process."""
        arguments = [
            "train",
            f"--config={trial.config}",
            f"--workdir={trial.workdir.argument}",
            *flags,
        ]
        settings = self.environment() | trial.environment | environment
        return runs.start(
            trial.scratch / "attempts", arguments, num_processes, of_slice, each, **settings
        )


@functools.cache
def _reference(setting: Setting, num_processes: int) -> Reference:
    folder = setting.out / "reference" / str(num_processes)
    trial = Trial(folder, setting.out / "data.py", Local(folder / "run"), {})
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        # The first compiles; the second shows how long everything takes with what is compiled.
        for _ in range(2):
            shutil.rmtree(folder / "run", ignore_errors=True)
            attempt = setting.train(trial, num_processes)
            if any(statuses := attempt.wait()):
                raise Wrong(f"an undisturbed run ended with {statuses}: {attempt.printed()[-500:]}")
        (folder / "done").touch()
    told = trial.told()
    return Reference(
        lines=workdirs.lines(trial.workdir),
        arrays=workdirs.arrays(folder / "run"),
        batches=workdirs.batches(told),
        checkpoints=checkpoints(trial.workdir),
        seconds=_seconds(told[-num_processes]),
    )


def checkpoints(workdir: Workdir) -> set[int]:
    """Returns the steps whose checkpoints are whole."""
    return {int(name.split("/")[1]) for name in workdir.names() if _is_commit(name)}


def _is_commit(name: str) -> bool:
    parts = name.split("/")
    return (
        len(parts) == 3
        and parts[0] == "checkpoints"
        and parts[1].isdigit()
        and parts[2] == workdirs.WHOLE
    )


def _seconds(events: list[dict]) -> dict[str, list[float]]:
    """The lengths of a process's phases."""
    marks = [(event["phase"], event["time"]) for event in events if "phase" in event]
    found: dict[str, list[float]] = defaultdict(list)
    found["start-up"] = [marks[0][1] - events[0]["time"] + 1.0]
    has_trained = False
    for (phase, begin), (_, end) in zip(marks, [*marks[1:], marks[-1]], strict=True):
        has_trained = has_trained or phase == "training"
        name = phase if phase != "starting" else "stage change" if has_trained else "start-up"
        found[name].append(end - begin)
    return dict(found)


@dataclasses.dataclass
class Trial:
    """Where one trial takes place, and who waits there."""

    scratch: Path
    config: Path
    workdir: Workdir
    environment: dict[str, str]
    bucket: FakeBucket | None = None

    def told(self) -> list[list[dict]]:
        """Returns the events of all processes of all attempts, in order."""
        files = sorted(
            (self.scratch / "attempts").glob("*.events"), key=lambda path: _numbers(path.stem)
        )
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def _numbers(stem: str) -> tuple[int, ...]:
    return tuple(int(number) for number in stem.split("-"))


@contextlib.contextmanager
def local(setting: Setting, scratch: Path) -> Iterator[Trial]:
    """A trial on a disk."""
    yield Trial(scratch, setting.out / "data.py", Local(scratch / "run"), {})


@contextlib.contextmanager
def in_bucket(setting: Setting, scratch: Path, seed: int, **faults: float | str) -> Iterator[Trial]:
    """A trial whose workdir and data are in a bucket of its own with faults."""
    with FakeBucket() as bucket:
        runs.at_work.add(bucket._process)
        folder = bucket.put_folder(setting.out / "data", "data")
        config = workload.write_config(scratch / "config.py", folder)
        with bucket.faulty(seed=seed, **(faults or FAULTS)):
            yield Trial(scratch, config, InBucket(bucket, "run"), bucket.environment(), bucket)


def place(setting: Setting, scratch: Path, rng: random.Random, of_bucket: bool):
    """A trial on a disk or in a bucket."""
    return (
        in_bucket(setting, scratch, rng.randrange(2**31)) if of_bucket else local(setting, scratch)
    )


def check_done(trial: Trial, reference: Reference) -> int:
    """Raises Wrong unless the run is the undisturbed one to the last bit; returns how many
    checkpoints it has beyond those of it."""
    found = workdirs.lines(trial.workdir)
    workdirs.check_lines(found, reference.lines, workload.TOTAL)
    if len(found) != len(reference.lines):
        raise Wrong(f"metrics.jsonl has {len(found)} lines, not {len(reference.lines)}")
    workdirs.check_arrays(
        workdirs.arrays(trial.workdir.local_copy(trial.scratch / "copy")), reference.arrays
    )
    if (ours := workdirs.batches(trial.told())) != reference.batches:
        places = sorted(
            key
            for key in ours.keys() | reference.batches
            if ours.get(key) != reference.batches.get(key)
        )
        raise Wrong(f"other records in the rows of {places[:3]} than without disturbance")
    left = [name for name in trial.workdir.names() if "orbax-checkpoint-tmp" in name]
    if left:
        raise Wrong(f"{len(left)} files of an unfinished checkpoint are left: {left[0]}")
    there = checkpoints(trial.workdir)
    if missing := reference.checkpoints - there:
        raise Wrong(f"checkpoints {sorted(missing)} are missing")
    return len(there - reference.checkpoints)


def check_went_on(trial: Trial, attempt: Attempt, newest: int) -> None:
    """Raises Wrong unless every process of an attempt took the steps after the newest checkpoint,
    one by one."""
    for process in range(len(attempt.processes)):
        taken = workdirs.steps(attempt.told(process))
        if taken != list(range(newest + 1, newest + 1 + len(taken))):
            raise Wrong(f"from checkpoint {newest} process {process} took the steps {taken}")
