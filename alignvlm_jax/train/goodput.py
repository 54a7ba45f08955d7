"""Where the wall time of a run goes: what its process does at the moment, and sums over the run.

The thread of the training loop enters and leaves the phases of `Phases`; heartbeat and watchdog,
in threads of their own, look on. A run that is stopped and goes on carries its sums in the lines
of metrics.jsonl (`Phases.metrics`, `carried`).
"""

import collections
import contextlib
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CATEGORY_OF = {
    "starting": "other",
    "restoring": "other",
    "compiling": "compile",
    "training": "steps",
    "waiting": "data_wait",
    "saving": "save",
    "validating": "evaluation",
    "generating": "evaluation",
}
"""The phases of a process, and what each counts as."""

CATEGORIES = ("steps", "compile", "data_wait", "save", "evaluation", "restart", "other")
"""Restart is all time of a process that goes on with a run before its first step, and all that was
lost since the checkpoint that it goes on from."""

PREFIX = "goodput/"
TOTAL = PREFIX + "seconds"
COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Phases:
    """What the process does now, and the seconds it has spent on everything, each second once."""

    def __init__(self, began: float | None = None):
        """`began` is when the process began, on the clock of `time.monotonic`; default: now."""
        self._began = time.monotonic() if began is None else began
        self._mark = self._began
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._carried = dict.fromkeys(CATEGORIES, 0.0)
        self._stack = ["starting"]
        self._restarting = False
        self._step_began = 0.0
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=64)
        self._thread = threading.get_ident()
        self.num_steps = 0
        """Of the run, the newest that has ended."""
        self.moved = self._mark
        """When a phase began or ended, a step ended, or `progress` was called last."""

    def __enter__(self) -> "Phases":
        import jax  # Not above: who only reads phases should not wait for it.

        jax.monitoring.register_event_duration_secs_listener(self._note_compile)
        return self

    def __exit__(self, *_: object) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._note_compile)

    @property
    def now(self) -> str:
        """The phase that the process is in."""
        return self._stack[-1]

    @contextlib.contextmanager
    def enter(self, phase: str) -> Iterator[None]:
        """Counts the time inside as that of `phase`, a name of CATEGORY_OF; phases nest."""
        if phase not in CATEGORY_OF:
            raise KeyError(phase)
        if phase == "compiling":  # Of another step function, whose steps may be slower.
            self._step_seconds.clear()
        self._add()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._add()
            self._stack.pop()

    def step(self, number: int) -> None:
        """Notes that a step has ended. The first one ends a restart: the time so far was lost."""
        self._add()
        if self._restarting:
            self._restarting = False
            spent = sum(self._seconds.values())
            self._seconds = dict.fromkeys(CATEGORIES, 0.0) | {"restart": spent}
        else:
            self._step_seconds.append(self._stepping() - self._step_began)
        self._step_began = self._stepping()
        self.num_steps = number

    def progress(self) -> None:
        """Notes that a phase of many parts moves on, such as one batch of validation."""
        self.moved = time.monotonic()

    def move(self, source: str, target: str, seconds: float) -> None:
        """Counts seconds of one phase as of another."""
        self._add()
        self._seconds[CATEGORY_OF[source]] -= seconds
        self._seconds[CATEGORY_OF[target]] += seconds

    def resume(self, step: int, carried: Mapping[str, float], beat_seconds: float = 0.0) -> None:
        """Goes on with a run from `step`: until the next step has ended all is a restart.

        Args:
          step: of the checkpoint.
          carried: of `carried`.
          beat_seconds: `run_seconds` of the last heartbeat, which may be younger than the last
            line.
        """
        self.num_steps = step
        self._restarting = True
        self._carried = dict(carried)
        self._carried["restart"] += max(0.0, beat_seconds - sum(carried.values()))

    def median_step_seconds(self) -> float | None:
        """Returns the median time of the newest steps without validation, saves and the like."""
        try:
            return statistics.median(self._step_seconds)
        except (statistics.StatisticsError, RuntimeError):  # None yet, or one was added meanwhile.
            return None

    def run_seconds(self) -> float:
        """Returns the wall time of the run so far, over all its processes one after the other."""
        return sum(self._carried.values()) + time.monotonic() - self._began

    def data_wait_fraction(self) -> float:
        """Returns the fraction of this process's own time in which it waited for data."""
        spent = sum(self._seconds.values())
        return self._seconds["data_wait"] / spent if spent else 0.0

    def metrics(self) -> dict[str, float]:
        """Returns `goodput/CATEGORY`, the fraction of the run's wall time, and
        `goodput/seconds`."""
        self._add()
        total = {name: self._carried[name] + self._seconds[name] for name in CATEGORIES}
        seconds = sum(total.values())
        return {PREFIX + name: total[name] / seconds for name in CATEGORIES} | {TOTAL: seconds}

    def _stepping(self) -> float:
        return self._seconds["steps"] + self._seconds["data_wait"]

    def _add(self) -> None:
        now = time.monotonic()
        self._seconds[CATEGORY_OF[self.now]] += now - self._mark
        self._mark = self.moved = now

    def _note_compile(self, event: str, seconds: float, **_: Any) -> None:
        """Compiling inside another phase counts as such: a first validation compiles, and so on."""
        is_ours = event in COMPILE_EVENTS and threading.get_ident() == self._thread
        if is_ours and self.now != "compiling":
            self.move(self.now, "compiling", seconds)


def carried(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Returns the seconds by category that a run has spent before it goes on from `step`.

    Whatever was spent after that step's line was in vain, and counts as restart.

    Args:
      lines: of metrics.jsonl, before those beyond `step` are cut off.
      step: of the checkpoint; 0 without one.
    """
    last = _newest(lines)
    kept = _newest([line for line in lines if line["step"] <= step])
    lost = sum(last.values()) - sum(kept.values())
    return kept | {"restart": kept["restart"] + lost}


def logged(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl that hold sums; who reads them for more complains of
    others."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line and line.get(TOTAL):
                found.append(line)
    return found


def _newest(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    for line in reversed(lines):
        if line.get(TOTAL):
            return {name: (line.get(PREFIX + name) or 0.0) * line[TOTAL] for name in CATEGORIES}
    return dict.fromkeys(CATEGORIES, 0.0)


def process_began() -> float:
    """Returns when this process began, on the clock of `time.monotonic`; now where it is not
    known."""
    now = time.monotonic()
    try:
        with open("/proc/self/stat") as file:
            # Fields are counted from 1; the second, in brackets, may hold spaces.
            ticks = int(file.read().rpartition(")")[2].split()[22 - 3])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - max(0.0, age)
