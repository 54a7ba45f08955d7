"""A watchdog that ends a process which hangs.

A process may hang in a collective that another host never joins, or in a read that never returns.
The watchdog observes `goodput.Phases` from a thread of its own.
"""

import contextlib
import ctypes
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from absl import logging

from alignvlm_jax import logs, storage
from alignvlm_jax.config import Config
from alignvlm_jax.errors import TRY_AGAIN_STATUS
from alignvlm_jax.train.goodput import Phases
from alignvlm_jax.train.heartbeat import FINAL_SECONDS, Heartbeat, within

CLOCK_MONOTONIC = 1
SIGEV_THREAD = 2


class _Event(ctypes.Structure):
    """The `struct sigevent` of Linux's 64-bit C libraries, of 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _Times(ctypes.Structure):
    """The `struct itimerspec`: an interval, which stays 0, and the time until the timer fires.

    If all fields are 0 the timer stops.
    """

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class ExitTimer:
    """A POSIX timer that ends the process with `status`, unless it is set anew or closed in time.

    It works even if no Python code can run any more, because a C call never releases the GIL.
    """

    def __init__(self, status: int):
        """Creates the timer, which is not running yet.

        Raises:
          OSError: the system has no such timers.
        """
        self._library = _library()
        # C's _exit itself is the notification function, called in a thread of the C library with
        # `status` as its argument: no Python is involved.
        exit_function = ctypes.cast(self._library._exit, ctypes.c_void_p)
        event = _Event(value=status, notify=SIGEV_THREAD, function=exit_function)
        self._timer = ctypes.c_void_p()
        if self._library.timer_create(
            CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
        ):
            raise OSError(ctypes.get_errno(), "no timer could be made")

    def set(self, seconds: float) -> None:
        """Starts the timer, or restarts it, to fire after `seconds`."""
        whole = int(seconds)
        # A nanosecond at least: a time of 0 would stop the timer.
        times = _Times(0, 0, whole, max(1, int((seconds - whole) * 1e9)))
        self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def close(self) -> None:
        """Deletes the timer."""
        self._library.timer_delete(self._timer)


def _library() -> ctypes.CDLL:
    """Returns the C library with POSIX timers; raises OSError if there is none."""
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(f"no such timers on {sys.platform}")
    # Before glibc 2.34 timers were in librt, since then in libc itself.
    for name in (None, "librt.so.1"):
        try:
            library = ctypes.CDLL(name, use_errno=True)
            pointer = ctypes.c_void_p
            library.timer_create.argtypes = (ctypes.c_int, pointer, pointer)
            library.timer_settime.argtypes = (pointer, ctypes.c_int, pointer, pointer)
            library.timer_delete.argtypes = (pointer,)
            return library
        except (OSError, AttributeError):
            continue
    raise OSError("the C library has no timer_create")


STALLED_STATUS = TRY_AGAIN_STATUS
"""Exit status of a process that its watchdog has ended: the same command resumes the run."""

LIMITS = {
    "training": 1,
    "waiting": 1,
    "saving": 3,
    "validating": 3,
    "generating": 3,
    "compiling": 6,
    "starting": 6,
    "restoring": 6,
}
"""The factor of `train.stall_minutes` for which each phase may last without moving."""

SLOW_STEPS = 20
"""Number of (median) steps whose time a run may always last without moving."""


class Watchdog:
    """A thread that dumps all stacks and ends the process with status 75 if it does not move.

    The stacks, in the log and on stderr, show in which function each thread is stuck. If even this
    thread cannot run, because a C call keeps the GIL, timers in C dump the stacks and end the
    process.
    """

    def __init__(
        self,
        phases: Phases,
        stall_minutes: float,
        log: TextIO,
        before_exit: Callable[[], None] = lambda: None,
        grace: float = 10.0,
    ):
        """Prepares the watchdog, which runs while entered.

        Args:
          phases: the phases of this process.
          stall_minutes: minutes without moving, from which `limit` follows; 0 turns it off.
          log: a file with a descriptor, where stacks go.
          before_exit: called before the process is ended.
          grace: seconds between the dump and the end. Other processes that are stuck with this one
            dump their stacks meanwhile, and a process that moves again is not ended.
        """
        self._phases = phases
        self._base = 60 * stall_minutes
        self._log = log
        self._before_exit = before_exit
        self._grace = grace
        self._tick = min(5.0, self._base / 20)
        self._ended = threading.Event()
        # With a terminal, Ctrl-Z may stop the process, but not the clock of a timer in C: it would
        # end the process as it continues.
        self._is_alone = not _has_terminal()
        self._exit_timer = _exit_timer() if stall_minutes and self._is_alone else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._base:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._base:
            self._ended.set()
            self._thread.join()

    def limit(self) -> float | None:
        """Returns the seconds without moving after which the process is ended in its present phase.

        Returns None if it is never ended.
        """
        if not self._base:
            return None
        median = self._phases.median_step_seconds()
        # Before the first steps nobody knows how long one takes.
        if median is None:
            return self._base * max(LIMITS.values())
        return max(self._base, SLOW_STEPS * median) * LIMITS[self._phases.now]

    def _watch(self) -> None:
        still = 0.0
        seen = self._phases.moved
        last = time.monotonic()
        try:
            while not self._ended.wait(self._tick):
                now = time.monotonic()
                moved = self._phases.moved
                # Ticks are added up, each with a bound: a process that was itself stopped (Ctrl-Z),
                # or got no CPU time, has not been stuck meanwhile.
                still = still + min(now - last, 2 * self._tick) if moved == seen else 0.0
                seen = moved
                last = now
                limit = self.limit()
                self._arm_last_resort(max(0.0, limit - still))
                if still >= limit and self._is_stuck(seen, still, limit):
                    self._end()
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._exit_timer:
                self._exit_timer.close()

    def _is_stuck(self, seen: float, still: float, limit: float) -> bool:
        """Dumps all stacks, and returns whether the process still has not moved after `grace`."""
        message = (
            f"no progress for {still:.0f} s while {self._phases.now}, after step "
            f"{self._phases.num_steps}; the limit is {limit:.0f} s (config.train.stall_minutes)"
        )
        logging.error("%s; the stacks of all threads:", message)
        # sys.__stderr__: a live progress line may have replaced sys.stderr by an object without a
        # file descriptor, which faulthandler needs.
        for file in (self._log, sys.__stderr__):
            with contextlib.suppress(OSError, ValueError):
                print(f"alignvlm_jax: {message}; the stacks of all threads:", file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        if self._ended.wait(self._grace):
            return False
        if self._phases.moved != seen:
            logging.warning("it moves again")
            return False
        return True

    def _end(self) -> None:
        message = (
            f"ended with status {STALLED_STATUS}: the same command goes on from the newest "
            "checkpoint"
        )
        logging.error("%s", message)
        with contextlib.suppress(OSError, ValueError):
            print(f"alignvlm_jax: error: {message}", file=sys.__stderr__, flush=True)
        within(FINAL_SECONDS, self._before_exit)
        # Not sys.exit, which ends only this thread, and would wait for the stuck one.
        os._exit(STALLED_STATUS)

    def _arm_last_resort(self, seconds: float) -> None:
        """Sets timers in C that fire in `seconds` and a margin, unless they are set anew."""
        # The margin leaves time for this thread to dump and end the process itself.
        seconds += 2 * (self._tick + self._grace) + FINAL_SECONDS
        # Without timers of the C library faulthandler ends the process, with status 1.
        exits = self._is_alone and self._exit_timer is None
        faulthandler.dump_traceback_later(seconds, file=self._log, exit=exits)
        if self._exit_timer:
            self._exit_timer.set(seconds + 1)


@contextlib.contextmanager
def watched(
    folder: Path,
    phases: Phases,
    *,
    process: int,
    num_processes: int,
    total: int,
    stall_minutes: float,
    log: TextIO,
    stopped: tuple[type[BaseException], ...] = (),
) -> Iterator[Heartbeat]:
    """A context in which heartbeat and watchdog of a training process run; yields the heartbeat.

    Args:
      folder: the workdir.
      phases: the phases of the process.
      process: number of this process.
      num_processes: number of processes of the run.
      total: number of steps of the run.
      stall_minutes: limit of the watchdog; 0 turns it off.
      log: the host's log, where stacks go.
      stopped: exceptions that end a run which was told to stop.
    """

    # What an orderly exit would do, since os._exit runs neither `finally` nor exit handlers.
    def before_exit() -> None:
        storage.close_all()
        heartbeat.end("stalled")
        logs.ship_all()

    watchdog = Watchdog(phases, stall_minutes, log, before_exit)
    heartbeat = Heartbeat(
        folder,
        phases,
        process=process,
        num_processes=num_processes,
        total=total,
        limit=watchdog.limit,
        stopped=stopped,
    )
    with heartbeat, watchdog:
        yield heartbeat


def stall_minutes(stages: Sequence[Config]) -> float:
    """Returns the largest `train.stall_minutes` of all stages; 0 (off) if a stage has 0."""
    minutes = [stage.train.stall_minutes for stage in stages]
    return max(minutes) if all(minutes) else 0.0


def _exit_timer() -> ExitTimer | None:
    """Returns a timer that ends the process; None if the system has none."""
    try:
        return ExitTimer(STALLED_STATUS)
    except OSError:
        return None


def _has_terminal() -> bool:
    """Whether standard input is a terminal."""
    try:
        return os.isatty(0)
    except OSError:  # standard input is closed
        return False
