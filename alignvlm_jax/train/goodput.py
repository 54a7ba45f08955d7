"""Goodput: the wall time of a run by category, and the phase that its process is in.

The thread of the training loop enters and leaves the phases of `Phases`; heartbeat and watchdog
read them from threads of their own. A run that is stopped and resumed carries its sums in the lines
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

from alignvlm_jax.errors import counted

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
"""The category of each phase of a process."""

CATEGORIES = ("steps", "compile", "data_wait", "save", "evaluation", "restart", "other")
"""The categories of wall time.

"restart" is all time of a resuming process before its first step, and all time that was spent
beyond the checkpoint from which it resumes.
"""

PREFIX = "goodput/"
TOTAL = PREFIX + "seconds"
# Lowering and XLA's compilation, as JAX reports them; tracing is not a part of either.
COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


EVALUATIONS = {"validating": "validation", "generating": "generation eval"}
"""What a message counts of the phases that may take as long as all steps together."""


class Course:
    """What of a stage is to come: steps, and the pauses between them, validation, generated answers
    and saves. How long these take is known from those so far."""

    def __init__(self, begin: int, end: int, every: Mapping[str, int], then: Sequence[str] = ()):
        """
        Args:
          begin: step of the run with which the stage before ended.
          end: last step of the stage.
          every: by phase, the steps between two pauses in the stage; 0 where there are none.
          then: names of the stages that follow.
        """
        self._begin = begin
        self._end = end
        self._every = {phase: steps for phase, steps in every.items() if steps}
        self._then = then
        self._seconds: dict[str, list[float]] = {}

    def note(self, phase: str, seconds: float) -> None:
        """Notes how long a pause was."""
        self._seconds.setdefault(phase, []).append(seconds)

    def left(self, step: int, step_seconds: float) -> str:
        """Returns the time that is left of the stage when step `step` of the run has ended and its
        pauses are to come, in words; "" where nothing is left whose time is known.

        Args:
          step: of the run.
          step_seconds: what a step takes.
        """
        seconds = (self._end - step) * step_seconds
        unknown = []
        for phase in self._every:
            count = self._num_pauses(phase, step)
            measured = self._seconds.get(phase, [])
            if measured:
                # The first may have compiled something.
                seconds += count * statistics.mean(measured[1:] or measured)
            elif count and phase in EVALUATIONS:
                unknown.append(counted(count, EVALUATIONS[phase]))
        if not seconds:
            return ""
        left = f"{' and '.join([duration(max(1, seconds)), *unknown])} left"
        if not self._then:
            return left
        others = f" and {len(self._then) - 1} more" if len(self._then) > 1 else ""
        return f"{left} in this stage, then {self._then[0]}{others}"

    def _num_pauses(self, phase: str, step: int) -> int:
        """Returns how many pauses are due at `step` and later: every so many steps, and at the
        stage's end."""
        every = self._every[phase]
        length = self._end - self._begin
        # Those at steps before this one are over; at the begin itself there is none.
        over = max(step - 1 - self._begin, 0) // every
        return length // every - over + bool(length % every)


class Phases:
    """The stack of phases that a process is in, and the seconds that it has spent in each category.

    Each second counts once, for the innermost phase. A context manager: while entered, compilation
    in any phase is noticed.
    """

    def __init__(self, began: float | None = None):
        """Begins in the phase "starting".

        Args:
          began: the time at which the process began, by `time.monotonic`; default: now.
        """
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
        """Number of the newest step of the run that has ended."""
        self.moved = self._mark
        """The last time at which a phase began or ended, a step ended, or `progress` was called."""

    def __enter__(self) -> "Phases":
        # Imported here: a program that only reads phases should not wait for JAX.
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._note_compile)
        return self

    def __exit__(self, *_: object) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._note_compile)

    @property
    def now(self) -> str:
        """The innermost phase that the process is in."""
        return self._stack[-1]

    @contextlib.contextmanager
    def enter(self, phase: str) -> Iterator[None]:
        """A context whose time counts for `phase`, a name of `CATEGORY_OF`; phases nest.

        Raises:
          KeyError: there is no such phase.
        """
        if phase not in CATEGORY_OF:
            raise KeyError(phase)
        # Another step function is about to run, whose steps may be slower: with the old median the
        # watchdog's limit could be too short.
        if phase == "compiling":
            self._step_seconds.clear()
        self._add()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._add()
            self._stack.pop()

    def step(self, number: int) -> None:
        """Notes that step `number` of the run has ended; the first one ends a restart."""
        self._add()
        # All time of this process so far, whatever its category, was the price of the restart.
        if self._restarting:
            self._restarting = False
            spent = sum(self._seconds.values())
            self._seconds = dict.fromkeys(CATEGORIES, 0.0) | {"restart": spent}
        else:
            self._step_seconds.append(self._stepping() - self._step_began)
        self._step_began = self._stepping()
        self.num_steps = number

    def progress(self) -> None:
        """Notes that a long phase has moved on, as by one batch of validation."""
        self.moved = time.monotonic()

    def move(self, source: str, target: str, seconds: float) -> None:
        """Moves seconds from the category of one phase to that of another."""
        self._add()
        self._seconds[CATEGORY_OF[source]] -= seconds
        self._seconds[CATEGORY_OF[target]] += seconds

    def resume(self, step: int, carried: Mapping[str, float], beat_seconds: float = 0.0) -> None:
        """Resumes a run from a checkpoint: all time until the next step has ended is a restart.

        Args:
          step: step of the checkpoint.
          carried: seconds by category, as the function `carried` returns them.
          beat_seconds: `run_seconds` of the last heartbeat.
        """
        self.num_steps = step
        self._restarting = True
        self._carried = dict(carried)
        # The heartbeat may be younger than the last line of metrics: the time between was lost.
        self._carried["restart"] += max(0.0, beat_seconds - sum(carried.values()))

    def median_step_seconds(self) -> float | None:
        """Returns the median seconds of the newest 64 steps, without validation, saves and so on.

        Returns None if there is no step yet.
        """
        # Called from other threads: RuntimeError if the loop's thread adds a step meanwhile.
        try:
            return statistics.median(self._step_seconds)
        except (statistics.StatisticsError, RuntimeError):
            return None

    def run_seconds(self) -> float:
        """Returns the seconds of wall time of the run so far, its earlier processes included."""
        return sum(self._carried.values()) + time.monotonic() - self._began

    def data_wait_fraction(self) -> float:
        """Returns the fraction of this process's time in which it waited for data."""
        spent = sum(self._seconds.values())
        return self._seconds["data_wait"] / spent if spent else 0.0

    def metrics(self) -> dict[str, float]:
        """Returns the fractions of the run's wall time, `goodput/CATEGORY`, and `goodput/seconds`.

        From these the function `carried` recovers the sums.
        """
        self._add()
        total = {name: self._carried[name] + self._seconds[name] for name in CATEGORIES}
        seconds = sum(total.values())
        return {PREFIX + name: total[name] / seconds for name in CATEGORIES} | {TOTAL: seconds}

    def _stepping(self) -> float:
        """Returns the seconds in steps so far: differences of it leave out all other phases."""
        return self._seconds["steps"] + self._seconds["data_wait"]

    def _add(self) -> None:
        """Adds the time since the last call to the category of the phase that the process is in."""
        now = time.monotonic()
        self._seconds[CATEGORY_OF[self.now]] += now - self._mark
        self._mark = self.moved = now

    def _note_compile(self, event: str, seconds: float, **_: Any) -> None:
        """Counts compilation inside another phase, as in a first validation, as compiling."""
        # The listener is called in whichever thread compiles: a thread of the loader must not take
        # time from the loop's phase.
        is_ours = event in COMPILE_EVENTS and threading.get_ident() == self._thread
        if is_ours and self.now != "compiling":
            self.move(self.now, "compiling", seconds)


def carried(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Returns the seconds by category that a run has spent before it resumes from `step`.

    Time that was spent after that step's line is lost, and counts as restart.

    Args:
      lines: the lines of metrics.jsonl, before those beyond `step` are cut off.
      step: step of the checkpoint; 0 without one.
    """
    # A line holds sums since the start of the run: the newest one of each kind is enough.
    last = _newest(lines)
    kept = _newest([line for line in lines if line["step"] <= step])
    lost = sum(last.values()) - sum(kept.values())
    return kept | {"restart": kept["restart"] + lost}


def logged(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl that hold sums of wall time.

    Damaged lines are left out silently: `metrics.cut` reports them.
    """
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line and line.get(TOTAL):
                found.append(line)
    return found


def _newest(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the seconds by category that the newest line holds; zeros if there is none."""
    for line in reversed(lines):
        if line.get(TOTAL):
            return {name: (line.get(PREFIX + name) or 0.0) * line[TOTAL] for name in CATEGORIES}
    return dict.fromkeys(CATEGORIES, 0.0)


def process_began() -> float:
    """Returns the time at which this process began, by `time.monotonic`; now if it is unknown."""
    now = time.monotonic()
    try:
        with open("/proc/self/stat") as file:
            # Field 22 of proc(5), counted from 1, is the start time in ticks since boot. The second
            # field, the name in brackets, may hold spaces: what follows it begins with the third.
            ticks = int(file.read().rpartition(")")[2].split()[22 - 3])
        # By the clock since boot, which runs on while the machine is suspended, as ticks do.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - max(0.0, age)


def duration(seconds: float) -> str:
    """Returns a duration in words, as "1 h 02 min", "2 min 05 s" or "7 s"."""
    seconds = round(seconds)
    hours = seconds // 3600
    minutes = seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"
