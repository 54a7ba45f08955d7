"""Where a process stands, for others to read while it runs:

    WORKDIR/heartbeats/host-N.json, one a process

A thread of its own writes it, since the loop's may be the one that hangs.
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
"""How often the main process looks at the heartbeats of the others."""

FINAL_SECONDS = 10.0
"""A last heartbeat that the storage does not take in this time is given up."""


class Heartbeat:
    """Rewrites the heartbeat file of this process every few seconds, whole each time.

    It holds, beside host, process and pid: step and total, of the run; the phase, one of
    `goodput.CATEGORY_OF`, at the end "done", "stopped", "failed" or "stalled"; `since`, the seconds
    since the phase began or moved (a step, a batch), and `limit`, those after which the watchdog
    ends the process; `seconds_per_step`, the median; `data_wait`, the fraction of the time of this
    process; `run_seconds`, the wall time of the run; `time`, that of writing, seconds since 1970.
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
        """`stopped` are the exceptions by which a run ends that was told to stop."""
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
        """The last heartbeat of the process before this one; empty where there is none."""

    def __enter__(self) -> "Heartbeat":
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
        """Writes the last heartbeat, with `phase`; storage that does not answer is not waited
        for."""
        self._ended.set()
        within(FINAL_SECONDS, self._thread.join)
        within(FINAL_SECONDS, lambda: self._beat(phase))

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self._beat()
            if self._process == 0 and time.monotonic() - self._polled >= POLL_SECONDS:
                self._polled = time.monotonic()
                self._try(self._poll)

    def _beat(self, phase: str | None = None) -> None:
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
        """An earlier run of more processes has left theirs."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._process == 0:
            for path in self._folder.glob("host-*.json"):
                if int(path.stem.removeprefix("host-")) >= self._num_processes:
                    path.unlink(missing_ok=True)

    def _poll(self) -> None:
        beats = [read(self._folder, process) for process in range(self._num_processes)]
        for line in self._others.poll([beat for beat in beats if beat]):
            logging.warning("%s", line)

    def _try(self, action: Callable[[], None]) -> None:
        """A heartbeat that cannot be written must not end a run; it is told once, and when it is
        over."""
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
    """The heartbeats of all processes as the main one sees them: who holds up the others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._changed: dict[int, tuple[float, float]] = {}

    def poll(self, beats: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns one line for every process that stands out. Clocks of hosts are not compared."""
        now = self._clock()
        lines = []
        for beat in beats:
            known = self._changed.get(beat["process"])
            if known is None or known[0] != beat["time"]:
                self._changed[beat["process"]] = known = (beat["time"], now)
            if now - known[1] >= POLL_SECONDS:
                lines.append(f"{_name(beat)}: no new heartbeat for {now - known[1]:.0f} s")
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
        if len(training) > len(apart):
            lines += [
                f"{_name(beat)}: {beat['phase']} for {beat['since']:.0f} s at step {beat['step']}, "
                f"and {len(training)} others wait in a step"
                for beat in apart
            ]
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
    """Returns the heartbeat file of a process in the folder of heartbeats."""
    return folder / f"host-{process}.json"


def read(folder: Path, process: int) -> dict[str, Any]:
    """Returns a heartbeat; an empty one where there is none that can be read."""
    try:
        return json.loads(path_of(folder, process).read_text())
    except (OSError, ValueError):
        return {}


def within(seconds: float, action: Callable[[], None]) -> bool:
    """Runs an action in a thread; returns whether it ended in time. It is left behind if not."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _name(beat: Mapping[str, Any]) -> str:
    return f"process {beat['process']} on {beat['host']}"
