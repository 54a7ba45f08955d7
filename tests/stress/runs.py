"""Commands of one or several processes that are watched from outside, killed and signalled."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import fast_xla
from tests.pod.slices import REPOSITORY, chips, free_port

PATIENCE = 600.0
"""Seconds after which a command that has not ended hangs, on a machine with other work."""
TICK = 0.005
at_work: set[subprocess.Popen] = set()
"""All processes that end with this one, when it is told to end."""
NUM_DEVICES = 2
"""Of a run, whatever the number of its processes: sums of two are the same in either order."""


class Hang(Exception):
    """A command did not end, or not do what was waited for."""


@dataclasses.dataclass(eq=False)
class Attempt:
    """The processes of one command at work, what they tell in their events, and what they
    printed."""

    processes: list[subprocess.Popen]
    events: list[Path]
    logs: list[Path]
    began: float

    def told(self, process: int = 0) -> list[dict]:
        """Returns the events of a process so far."""
        file = self.events[process]
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def phase(self, process: int = 0) -> str:
        """Returns the phase that a process is in; "start-up" before the first, "stage change"
        between two stages."""
        phases = [event["phase"] for event in self.told(process) if "phase" in event]
        if not phases:
            return "start-up"
        if phases[-1] != "starting":
            return phases[-1]
        return "stage change" if "training" in phases else "start-up"

    def is_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def await_phase(self, phase: str, count: int) -> bool:
        """Waits until process 0 has entered a phase so many times; False if a process ended
        before."""
        deadline = time.monotonic() + PATIENCE
        wanted = "starting" if phase == "stage change" else phase
        while self.is_running():
            phases = [event["phase"] for event in self.told() if "phase" in event]
            if phase == "stage change":
                phases = phases[phases.index("training") :] if "training" in phases else []
            if phases.count(wanted) >= count:
                return True
            if time.monotonic() > deadline:
                raise Hang(f"no {phase} in {PATIENCE:.0f} s")
            time.sleep(TICK)
        return False

    def send(self, number: int, processes: Sequence[int]) -> None:
        """Sends a signal to processes that have not ended."""
        for index in processes:
            if self.processes[index].poll() is None:
                self.processes[index].send_signal(number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Returns the exit statuses.

        Raises:
          Hang: one has not ended after so many seconds; all are killed.
        """
        deadline = time.monotonic() + seconds
        try:
            return [
                process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes
            ]
        except subprocess.TimeoutExpired as err:
            running = [i for i, process in enumerate(self.processes) if process.poll() is None]
            raise Hang(
                f"processes {running} had not ended after {seconds:.0f} s, in phase {self.phase()}"
            ) from err
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends all that is left."""
        for process in self.processes:
            process.kill()
            process.wait()
        at_work.difference_update(self.processes)

    def printed(self, process: int = 0) -> str:
        return self.logs[process].read_text(errors="replace")

    def errors(self, process: int = 0) -> list[str]:
        """Returns the lines that say what went wrong."""
        return [
            line
            for line in self.printed(process).splitlines()
            if line.startswith("alignvlm_jax: error")
        ]


def start(
    folder: Path,
    arguments: Sequence[str],
    num_processes: int = 1,
    of_slice: str = "",
    each: Sequence[Mapping[str, str]] = (),
    **environment: str,
) -> Attempt:
    """Starts a command as so many processes; events and output are files in `folder`, of the next
    free number. Variables that are "" are not set; those of `each` are of one process."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("*-0.log")))
    num_devices = len(chips(of_slice)) if of_slice else NUM_DEVICES
    flags = (
        f"--xla_force_host_platform_device_count={num_devices // num_processes} {fast_xla.FLAGS}"
    )
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(REPOSITORY),
        "STRESS_SLICE": of_slice,
    }
    if num_processes > 1:
        settings |= {
            "ALIGNVLM_COORDINATOR": f"127.0.0.1:{free_port()}",
            "ALIGNVLM_NUM_PROCESSES": str(num_processes),
        }
    events = [folder / f"{number}-{i}.events" for i in range(num_processes)]
    logs = [folder / f"{number}-{i}.log" for i in range(num_processes)]
    processes = []
    began = time.monotonic()
    for index in range(num_processes):
        own = {"STRESS_EVENTS": str(events[index])}
        if num_processes > 1:
            own["ALIGNVLM_PROCESS_ID"] = str(index)
        variables = os.environ | settings | own | environment | dict(each[index] if each else {})
        with logs[index].open("w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.stress.host", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=REPOSITORY,
                    env={name: text for name, text in variables.items() if text},
                )
            )
    at_work.update(processes)
    return Attempt(processes, events, logs, began)


def victims(rng: random.Random, num_processes: int) -> list[int]:
    """Returns the processes that a fault meets: all of them, or one."""
    everyone = list(range(num_processes))
    return everyone if num_processes == 1 or rng.random() < 0.5 else [rng.choice(everyone)]


def handle_signals() -> None:
    """From now on commands under way end with this process, when it is told to end."""

    def end(number: int, frame: object) -> None:
        for process in list(at_work):
            process.kill()
        os._exit(128 + number)

    # Commands below inherit nothing of it; a shell's background jobs would have them ignore SIGINT.
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
