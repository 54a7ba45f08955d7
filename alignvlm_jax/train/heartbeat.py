"""Heartbeats: a small file of each process that says what it does, for others to read:

    WORKDIR/heartbeats/host-N.json

A separate thread writes it, because the thread of the training loop may be the one that hangs.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from alignvlm_jax import storage
from alignvlm_jax.train.goodput import Phases

FOLDER = "heartbeats"
BEAT_SECONDS = 10.0
POLL_SECONDS = 60.0
"""Interval at which the main process reads the heartbeats of the others."""

ENDED = ("done", "stopped", "failed", "stalled")
"""Phases of a process that has ended."""
SILENT_SECONDS = 6 * BEAT_SECONDS
"""Age of a heartbeat from which its process is taken for gone."""
FINAL_SECONDS = 10.0
"""Longest time that a last heartbeat may take; then it is given up."""


class Heartbeat:
    """A writer that replaces the heartbeat file of this process every few seconds.

    The file is a JSON object with these fields:
      host, process, pid: which process it is.
      step, total: the newest step of the run, and the number of its steps.
      phase: one of `goodput.CATEGORY_OF`; at the end "done", "stopped", "failed" or "stalled".
      since: seconds since the phase began or moved (by a step or a batch).
      limit: seconds without moving after which the watchdog ends the process.
      seconds_per_step: median seconds of a step.
      data_wait: fraction of this process's time in which it waited for data.
      run_seconds: wall time of the run.
      time: time of writing, in seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        phases: Phases,
        *,
        process: int,
        num_processes: int,
        total: int,
        limit: Callable[[], float | None],
        stopped: tuple[type[BaseException], ...] = (),
        every: float = BEAT_SECONDS,
    ):
        """Prepares the writer, which runs while entered.

        Args:
          folder: the workdir.
          phases: the phases of this process.
          process: number of this process.
          num_processes: number of processes of the run.
          total: number of steps of the run.
          limit: returns the field `limit`.
          stopped: exceptions that end a run which was told to stop.
          every: seconds between two heartbeats.
        """
        self._folder = folder / FOLDER
        self._phases = phases
        self._process = process
        self._num_processes = num_processes
        self._total = total
        self._limit = limit
        self._stopped = (KeyboardInterrupt, *stopped)
        self._every = every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._others = Others()
        self._polled = time.monotonic()
        self._problem = ""
        self.earlier: dict[str, Any] = {}
        """The last heartbeat of the process that had this number before; empty if there is none."""

    def __enter__(self) -> "Heartbeat":
        # Read before the first heartbeat of this process replaces it.
        self.earlier = read(self._folder, self._process)
        self._try(self._clear)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end("done")
        else:
            self.end("stopped" if issubclass(kind, self._stopped) else "failed")

    def end(self, phase: str) -> None:
        """Writes the last heartbeat, with `phase`, unless the storage does not answer in time."""
        self._ended.set()
        # The thread first: a heartbeat that it is writing would replace the last one.
        within(FINAL_SECONDS, self._thread.join)
        within(FINAL_SECONDS, lambda: self._beat(phase))

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self._beat()
            if self._process == 0 and time.monotonic() - self._polled >= POLL_SECONDS:
                self._polled = time.monotonic()
                self._try(self._poll)

    def _beat(self, phase: str | None = None) -> None:
        """Writes a heartbeat, with `phase` in the place of the present one if given."""
        phases = self._phases
        fields = {
            "host": socket.gethostname(),
            "process": self._process,
            "pid": os.getpid(),
            "step": phases.num_steps,
            "total": self._total,
            "phase": phase or phases.now,
            "since": round(time.monotonic() - phases.moved, 1),
            "limit": self._limit(),
            "seconds_per_step": phases.median_step_seconds(),
            "data_wait": round(phases.data_wait_fraction(), 4),
            "run_seconds": round(phases.run_seconds(), 1),
            "time": round(time.time(), 1),
        }
        self._try(
            lambda: storage.write_whole(
                path_of(self._folder, self._process), json.dumps(fields) + "\n"
            )
        )

    def _clear(self) -> None:
        """Removes the heartbeats that an earlier run with more processes has left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._process == 0:
            for path in self._folder.glob("host-*.json"):
                if int(path.stem.removeprefix("host-")) >= self._num_processes:
                    path.unlink(missing_ok=True)

    def _poll(self) -> None:
        """Logs a warning for each process that stands out."""
        beats = [read(self._folder, process) for process in range(self._num_processes)]
        for line in self._others.poll([beat for beat in beats if beat]):
            logging.warning("%s", line)

    def _try(self, action: Callable[[], None]) -> None:
        """Runs an action; if it fails, logs that once, and once more when it succeeds again.

        A heartbeat that cannot be written must not end a run.
        """
        try:
            action()
            problem = ""
        except (OSError, ValueError) as err:
            problem = f"no heartbeat in {self._folder}: {err}"
        if problem and not self._problem:
            logging.warning("%s", problem)
        elif self._problem and not problem:
            logging.info("heartbeats are written again")
        self._problem = problem


class Others:
    """The heartbeats of all processes, by which the main one finds a process that delays others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._changed: dict[int, tuple[float, float]] = {}

    def poll(self, beats: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns a line for every process that stands out.

        A process stands out if its heartbeat does not change, if it is in another phase while the
        most wait in a step, or if it waits for data much longer than all others.
        """
        # A beat's own time only tells whether it is new. Its age is measured by this host's clock,
        # since the clocks of hosts may differ.
        now = self._clock()
        lines = []
        for beat in beats:
            known = self._changed.get(beat["process"])
            if known is None or known[0] != beat["time"]:
                self._changed[beat["process"]] = known = (beat["time"], now)
            if now - known[1] >= POLL_SECONDS:
                lines.append(f"{_name(beat)}: no new heartbeat for {now - known[1]:.0f} s")
        # In a step that has not moved for long, a process most likely waits in a collective for one
        # that is somewhere else.
        training = [
            beat
            for beat in beats
            if beat["phase"] == "training" and beat["since"] >= POLL_SECONDS / 2
        ]
        apart = [
            beat
            for beat in beats
            if beat["phase"] != "training" and beat["since"] >= POLL_SECONDS / 2
        ]
        # If most are elsewhere, as in a slow validation, the few in a step are not held up by one.
        if len(training) > len(apart):
            lines += [
                f"{_name(beat)}: {beat['phase']} for {beat['since']:.0f} s at step {beat['step']}, "
                f"and {len(training)} others wait in a step"
                for beat in apart
            ]
        # Twice as long as the second slowest: if all wait alike, no single host is to blame.
        slowest = max(beats, key=lambda beat: beat["data_wait"], default=None)
        if slowest and len(beats) > 1:
            rest = max(beat["data_wait"] for beat in beats if beat is not slowest)
            if slowest["data_wait"] > max(0.05, 2 * rest):
                waits = (
                    f"waits for data {slowest['data_wait']:.0%} of the time, the others "
                    f"{rest:.0%} at most"
                )
                lines.append(f"{_name(slowest)}: {waits}")
        return lines


def path_of(folder: Path, process: int) -> Path:
    """Returns the path of the heartbeat of a process in the folder of heartbeats."""
    return folder / f"host-{process}.json"


def read(folder: Path, process: int) -> dict[str, Any]:
    """Returns the fields of the heartbeat of a process; none if there is no readable one."""
    try:
        return json.loads(path_of(folder, process).read_text())
    except (OSError, ValueError):
        return {}


def no_checkpoint(workdir: Path) -> str:
    """Returns why a workdir has no checkpoint, for messages: its run is at work and has yet to
    write one, or it ended before."""
    beat = read(workdir / FOLDER, 0)
    problem = f"no checkpoint in {workdir}"
    if not {"time", "phase", "step", "total"} <= beat.keys():
        return problem
    at = f"step {beat['step']:,} of {beat['total']:,}"
    first = _first_checkpoint(workdir)
    age = time.time() - beat["time"]
    if beat["phase"] in ENDED or age > SILENT_SECONDS:
        how = (
            f"has {beat['phase']}" if beat["phase"] in ENDED else f"has been silent for {age:.0f} s"
        )
        return f"{problem}: its run {how} at {at}, and the first comes {first}; train it on"
    return (
        f"{problem} yet: {_name(beat)} (pid {beat['pid']}) is training in it, {beat['phase']} at "
        f"{at}; the first comes {first}"
    )


def _first_checkpoint(workdir: Path) -> str:
    """Returns when a run writes its first checkpoint."""
    try:
        train = json.loads((workdir / "config.json").read_text())[0]["train"]
        step = min(train["checkpoint_every"], train["num_steps"])
        minutes = train.get("checkpoint_minutes", 0)
    except (OSError, ValueError, TypeError, LookupError):
        return "later"
    by_time = f", or after {minutes:g} min if that is earlier" if minutes else ""
    return f"at step {step:,}{by_time}"


def within(seconds: float, action: Callable[[], None]) -> bool:
    """Runs an action in a thread and returns whether it ended in time; if not, it is abandoned."""
    # A daemon thread: Python does not wait for it at its exit.
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _name(beat: Mapping[str, Any]) -> str:
    return f"process {beat['process']} on {beat['host']}"
