"""Bad input as whole commands: each ends on all hosts with one line of the main process, and
nothing half done."""

import dataclasses
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.fake_bucket import Faults
from tests.pod.slices import free_port
from tests.stress import runs, setting, workdirs, workload
from tests.stress.runs import Attempt
from tests.stress.setting import Setting, Trial
from tests.stress.workdirs import Wrong

START_SECONDS = 90
"""Of a command to come so far as to see that something is wrong, on a machine with other work."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """How a command ends: statuses of its processes, what the one line of the main one holds, and
    how soon."""

    statuses: Sequence[int | None]
    line: str
    seconds: float = START_SECONDS
    goes_on: bool = False


Fault = Callable[[Setting, Trial, random.Random], tuple[Attempt, Expected]]


def meet(shared: Setting, number: int, rng: random.Random, scratch: Path) -> dict:
    """One fault, in turn; where the cause can pass, the same command then goes on to the end."""
    names = list(FAULTS)
    name = names[number % len(names)]
    act = FAULTS[name]
    where = (
        setting.in_bucket(shared, scratch, 0, latency=0.0) if name.startswith("bucket") else None
    )
    with where or setting.local(shared, scratch) as trial:
        attempt, expected = act(shared, trial, rng)
        began = time.monotonic()
        try:
            statuses = attempt.wait()
        finally:
            attempt.kill()
        seconds = round(time.monotonic() - began, 1)
        _check(name, attempt, statuses, expected, seconds)
        if trial.bucket:
            trial.bucket.faults = Faults()
            trial.bucket.hook = lambda method, names: None
        newest = workdirs.newest(trial.workdir)
        if newest:
            workdirs.check_lines(workdirs.lines(trial.workdir), shared.reference(1).lines, newest)
        if expected.goes_on:
            _go_on(shared, trial, name, len(attempt.processes))
    return {"longest": {f"seconds: {name}": seconds}}


def _check(
    name: str, attempt: Attempt, statuses: list[int], expected: Expected, seconds: float
) -> None:
    alike = [
        want is None or want == status
        for want, status in zip(expected.statuses, statuses, strict=True)
    ]
    errors = attempt.errors()
    others = [attempt.errors(i) for i in range(1, len(statuses))]
    if not all(alike):
        raise Wrong(f"{name}: ended with {statuses}: {errors or attempt.printed()[-300:]}")
    if expected.line and (len(errors) != 1 or not re.search(expected.line, errors[0])):
        raise Wrong(f"{name}: the main process said {errors or attempt.printed()[-300:]}")
    if expected.line and "Traceback" in attempt.printed():
        raise Wrong(f"{name}: a traceback on the terminal: {attempt.printed()[-300:]}")
    # A process that meets the same fault by itself says so, too; none says more than one line.
    if any(len(lines) > 1 for lines in others):
        raise Wrong(f"{name}: other processes said {others}")
    if seconds > expected.seconds:
        raise Wrong(f"{name}: it ended after {seconds:.0f} s; {expected.seconds:.0f} are allowed")


def _go_on(shared: Setting, trial: Trial, name: str, num_processes: int) -> None:
    newest = workdirs.newest(trial.workdir)
    again = shared.train(trial, num_processes)
    try:
        statuses = again.wait()
    finally:
        again.kill()
    if any(statuses):
        raise Wrong(
            f"{name}: once it had passed, the command ended with {statuses}: {again.errors()}"
        )
    setting.check_went_on(trial, again, newest)
    setting.check_done(trial, shared.reference(num_processes))


def _bucket_absent(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    trial.workdir.argument = "gs://no-such-bucket/run"
    return shared.train(trial, 2), Expected(
        [1, 1], r"no bucket gs://no-such-bucket|no-such-bucket.*no such bucket"
    )


def _bucket_forbidden(
    shared: Setting, trial: Trial, rng: random.Random
) -> tuple[Attempt, Expected]:
    trial.bucket.faults.status = 403
    return shared.train(trial, 2), Expected([1, 1], "no permission")


def _bucket_read_only(
    shared: Setting, trial: Trial, rng: random.Random
) -> tuple[Attempt, Expected]:
    """All that is not reading is refused."""

    def refuse(method: str, names: str) -> None:
        trial.bucket.faults.status = 403 if method != "GET" else 0

    trial.bucket.hook = refuse
    return shared.train(trial, 1), Expected([1], "no permission")


def _bucket_forbidden_later(
    shared: Setting, trial: Trial, rng: random.Random
) -> tuple[Attempt, Expected]:
    attempt = shared.train(trial, 2)
    attempt.await_phase(rng.choice(["saving", "training", "validating"]), 3)
    trial.bucket.faults.status = 403
    return attempt, Expected([1, 1], "no permission|could not be written|403", 120, goes_on=True)


def _bucket_silent_later(
    shared: Setting, trial: Trial, rng: random.Random
) -> tuple[Attempt, Expected]:
    attempt = shared.train(trial, 2, STRESS_SETTINGS='{"alignvlm_jax.storage.RUN_PATIENCE": 10.0}')
    attempt.await_phase(rng.choice(["saving", "training", "validating"]), 3)
    trial.bucket.faults.error_rate = 1.0
    return attempt, Expected([None, None], "", 180, goes_on=True)


def _absent_host(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    pod = {
        "ALIGNVLM_COORDINATOR": f"127.0.0.1:{free_port()}",
        "ALIGNVLM_NUM_PROCESSES": "2",
        "ALIGNVLM_PROCESS_ID": "0",
    }
    short = '{"alignvlm_jax.parallel.distributed.START_TIMEOUT_SECONDS": 10}'
    return shared.train(trial, 1, STRESS_SETTINGS=short, **pod), Expected(
        [75], "process 0 of 2 waited 10 s"
    )


def _late_host(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    each = [{}, {"STRESS_DELAY": "15"}]
    return shared.train(trial, 2, each=each), Expected([0, 0], "", runs.PATIENCE, goes_on=True)


def _frozen_host(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    """One that is stopped in a step is missed; set going again it finds that the others are
    gone."""
    attempt = shared.train(trial, 2)
    attempt.await_phase(rng.choice(["training", "saving", "validating"]), 2)
    attempt.send(signal.SIGSTOP, [1])
    attempt.processes[0].wait(runs.PATIENCE)
    attempt.send(signal.SIGCONT, [1])
    return attempt, Expected([75, None], "process 1 of 2 .* has not been heard of", goes_on=True)


def _dead_host(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    attempt = shared.train(trial, 2)
    attempt.await_phase("training", rng.choice([1, 2]))
    attempt.send(signal.SIGKILL, [1])
    return attempt, Expected([None, -signal.SIGKILL], "", 60, goes_on=True)


def _other_version(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    each = [{}, {"STRESS_VERSION": "0.1"}]
    return shared.train(trial, 2, each=each), Expected(
        [1, 1], "differ in optax: optax is .* on process 0 and '0.1'"
    )


def _other_clock(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    each = [{}, {"STRESS_CLOCK": str(rng.choice([-3600, -120, 120, 3600]))}]
    return shared.train(trial, 2, each=each), Expected([1, 1], "clocks of the processes differ by")


def _other_config(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    """The same command, and another file under the config's name."""
    text = trial.config.read_text().replace(
        "learning_rate=1e-3", 'learning_rate=float(os.environ["RATE"])'
    )
    trial.config = trial.scratch / "config.py"
    trial.config.write_text(f"import os\n{text}")
    each = [{"RATE": "1e-3"}, {"RATE": "2e-3"}]
    return shared.train(trial, 2, each=each), Expected(
        [1, 1], "differ in .*learning_rate is 0.001 on process 0 and 0.002"
    )


def _other_data(shared: Setting, trial: Trial, rng: random.Random) -> tuple[Attempt, Expected]:
    """The same folder by name, which on one host holds a record less."""
    each = []
    for host in ("a", "b"):
        shutil.copytree(shared.out / "data", trial.scratch / host / "data")
        each.append({"STRESS_CWD": str(trial.scratch / host)})
    other = trial.scratch / "b" / "data"
    for path in (other / "b").glob("validation-*"):
        shutil.copyfile(path, other / path.name)
    trial.config = workload.write_config(trial.scratch / "config.py", "data")
    return shared.train(trial, 2, each=each), Expected([1, 1], "differ in .*the data of stage")


FAULTS: Mapping[str, Fault] = {
    "bucket is not there": _bucket_absent,
    "bucket gives no permission": _bucket_forbidden,
    "bucket may only be read": _bucket_read_only,
    "bucket gives no permission any more": _bucket_forbidden_later,
    "bucket does not answer any more": _bucket_silent_later,
    "a host does not come": _absent_host,
    "a host comes late": _late_host,
    "a host freezes": _frozen_host,
    "a host dies": _dead_host,
    "a host has another version": _other_version,
    "a host has another clock": _other_clock,
    "a host has another config": _other_config,
    "a host has other data": _other_data,
}
