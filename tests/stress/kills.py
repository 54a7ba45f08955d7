"""Runs that are killed, and runs that are told to stop, at moments of every phase, until they are
done."""

import random
import signal
import time
from collections import Counter
from pathlib import Path

from tests.stress import runs, setting, workdirs
from tests.stress.runs import Attempt
from tests.stress.setting import Reference, Setting, Trial
from tests.stress.workdirs import Wrong

PHASES = (
    "start-up", "restoring", "compiling", "training", "waiting", "saving", "validating", "stage change", "generating",
)  # fmt: skip
"""In the order in which a trial comes to them: answers are generated in the last two stages
alone."""
AIMS = 5
"""Of a trial."""
LONELY_SECONDS = 150
"""In which the other processes end when one was killed: they miss it after 8 s here, and after
START_TIMEOUT_SECONDS of `tests.stress.host` where it was killed before it had joined them."""
AGAIN = (70, 75)
"""Statuses of processes that have lost another: launchers start them again."""
MAX_ATTEMPTS = 40


def kill(
    shared: Setting,
    number: int,
    rng: random.Random,
    scratch: Path,
    num_processes: int,
    of_bucket: bool,
) -> dict:
    """One run that is killed up to five times; returns what came of it."""
    reference = shared.reference(num_processes)
    aims = _aims(number, rng)
    told: Counter[str] = Counter()
    with setting.place(shared, scratch, rng, of_bucket) as trial:
        if number % 5 == 0:  # With what the workdir keeps of compiled programs, nothing at first.
            trial.environment |= {"JAX_COMPILATION_CACHE_DIR": ""}
        for _ in range(MAX_ATTEMPTS):
            newest = workdirs.newest(trial.workdir)
            attempt = shared.train(trial, num_processes)
            try:
                if aims and await_moment(attempt, aims.pop(0), rng, reference):
                    met = runs.victims(rng, num_processes)
                    phase = attempt.phase()
                    attempt.send(signal.SIGKILL, met)
                    statuses = attempt.wait(LONELY_SECONDS)
                    if -signal.SIGKILL in statuses:
                        told[f"kill/{phase}"] += 1
                        _check_survivors(attempt, statuses, told)
                else:
                    statuses = attempt.wait()
            finally:
                attempt.kill()
            check_after(trial, attempt, newest, reference)
            if not any(statuses):
                told["left over"] += setting.check_done(trial, reference)
                return _summary(told, "kill")
            if -signal.SIGKILL not in statuses:
                raise Wrong(
                    f"ended with {statuses}: "
                    f"{' '.join(attempt.errors()) or attempt.printed()[-300:]}"
                )
    raise Wrong(f"not done after {MAX_ATTEMPTS} attempts")


def _check_survivors(attempt: Attempt, statuses: list[int], told: Counter[str]) -> None:
    # The coordination service goes with the main process, and jax then aborts the others, from a
    # thread of its own.
    allowed = (
        (*AGAIN, -signal.SIGABRT, -signal.SIGSEGV) if statuses[0] == -signal.SIGKILL else AGAIN
    )
    for process, status in enumerate(statuses):
        if status == -signal.SIGKILL:
            continue
        told[f"survivor ends with {status}"] += 1
        if status not in allowed:
            raise Wrong(
                f"process {process}, whose fellow was killed, ended with {status}: "
                f"{attempt.errors(process)}"
            )


def stop(
    shared: Setting,
    number: int,
    rng: random.Random,
    scratch: Path,
    num_processes: int,
    of_bucket: bool,
    name: str,
) -> dict:
    """One run that is told to stop up to five times; returns what came of it."""
    reference = shared.reference(num_processes)
    aims = _aims(number, rng)
    told: Counter[str] = Counter()
    longest: dict[str, float] = {}
    with setting.place(shared, scratch, rng, of_bucket) as trial:
        for _ in range(MAX_ATTEMPTS):
            newest = workdirs.newest(trial.workdir)
            signalled = None
            attempt = shared.train(trial, num_processes)
            try:
                if aims and await_moment(attempt, aims.pop(0), rng, reference):
                    phase = attempt.phase()
                    signalled = time.monotonic()
                    attempt.send(getattr(signal, name), runs.victims(rng, num_processes))
                statuses = attempt.wait()
            finally:
                attempt.kill()
            check_after(trial, attempt, newest, reference)
            if not any(statuses):
                setting.check_done(trial, reference)
                return _summary(told, "stop") | {"longest": longest}
            if signalled is None:
                raise Wrong(
                    f"ended with {statuses}: "
                    f"{' '.join(attempt.errors()) or attempt.printed()[-300:]}"
                )
            seconds = round(time.monotonic() - signalled, 1)
            longest[phase] = max(longest.get(phase, 0.0), seconds)
            told[f"stop/{phase}"] += 1
            _check_stopped(trial, attempt, statuses, name, phase, seconds, reference, told)
    raise Wrong(f"not done after {MAX_ATTEMPTS} attempts")


def _check_stopped(
    trial: Trial,
    attempt: Attempt,
    statuses: list[int],
    name: str,
    phase: str,
    seconds: float,
    reference: Reference,
    told: Counter[str],
) -> None:
    """A process that has not begun to watch for signals ends as any other does; from then on the
    state is saved."""
    told[f"statuses {statuses}"] += 1
    began = any("phase" in event for event in attempt.told())
    errors = attempt.errors()
    stopped = [
        int(line.split(" at step ")[1].split()[0]) for line in errors if " stopped at step " in line
    ]
    # Of several processes all end as at a SIGTERM; one that has nothing to save yet says so.
    status = 130 if name == "SIGINT" and len(statuses) == 1 else 143
    if set(statuses) != {status} or not stopped:
        if began and phase not in ("start-up", "restoring"):
            raise Wrong(f"{name} while {phase}: ended with {statuses}: {attempt.errors()}")
        return
    if len(errors) != 1 or not stopped or "go on with:" not in errors[0]:
        raise Wrong(f"{name} while {phase}: it said {errors}")
    if (saved := workdirs.newest(trial.workdir)) != stopped[0]:
        raise Wrong(
            f"{name} while {phase}: stopped at step {stopped[0]}, and the newest checkpoint is of "
            f"{saved}"
        )
    # A machine with other work is slow in all of it: measured by the undisturbed run's own save and
    # step.
    save = max(reference.seconds["saving"])
    one_step = max(reference.seconds["training"])
    limit = (
        20 + 10 * (save + one_step)
        if phase not in ("compiling", "restoring", "start-up", "stage change")
        else 120
    )
    if seconds > limit:
        raise Wrong(
            f"{name} while {phase}: it ended {seconds:.0f} s later; {limit:.0f} s are allowed"
        )


def await_moment(attempt: Attempt, phase: str, rng: random.Random, reference: Reference) -> bool:
    """Waits until a random moment of a phase; False if the run ended before."""
    seconds = rng.choice(reference.seconds[phase]) * rng.random()
    if phase != "start-up" and not attempt.await_phase(phase, rng.choice([1, 1, 2])):
        return False
    time.sleep(seconds)
    return attempt.is_running()


def check_after(trial: Trial, attempt: Attempt, newest: int, reference: Reference) -> None:
    """Raises Wrong unless what an attempt left is the beginning of the undisturbed run."""
    setting.check_went_on(trial, attempt, newest)
    now = workdirs.newest(trial.workdir)
    if now < newest:
        raise Wrong(f"the newest checkpoint was of step {newest}, and is of {now}")
    workdirs.check_lines(workdirs.lines(trial.workdir), reference.lines, now)
    if broken := [name for name in trial.workdir.names() if ".broken" in name]:
        raise Wrong(f"a checkpoint was quarantined: {broken[0]}")


def _aims(number: int, rng: random.Random) -> list[str]:
    """Returns phases, in turn over the trials, in the order in which a run comes to them."""
    chosen = {(number * AIMS + i) % len(PHASES) for i in range(AIMS)}
    return [PHASES[i] for i in sorted(chosen)]


def _summary(told: Counter[str], what: str) -> dict:
    return {
        "faults": sum(n for key, n in told.items() if key.startswith(f"{what}/")),
        "told": dict(told),
    }
