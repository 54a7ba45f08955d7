"""A watchdog ends a process that hangs: in a collective that another host never joins, or in a read
that never returns. It looks at `goodput.Phases` from a thread of its own."""

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
    """`struct sigevent` of Linux's 64-bit C libraries: 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`: the interval, which stays 0, and the time to run; all 0 stops a
    timer."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class ExitTimer:
    """Ends the process with `status`, unless it is set anew or closed before its time."""

    def __init__(self, status: int):
        """Raises OSError where the system has no such timers."""
        self._library = _library()
        exit_function = ctypes.cast(self._library._exit, ctypes.c_void_p)
        event = _Event(value=status, notify=SIGEV_THREAD, function=exit_function)
        self._timer = ctypes.c_void_p()
        if self._library.timer_create(
            CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
        ):
            raise OSError(ctypes.get_errno(), "no timer could be made")

    def set(self, seconds: float) -> None:
        """Starts the timer, or starts it anew."""
        whole = int(seconds)
        times = _Times(0, 0, whole, max(1, int((seconds - whole) * 1e9)))
        self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)

    def close(self) -> None:
        """Stops the timer for good."""
        self._library.timer_delete(self._timer)


def _library() -> ctypes.CDLL:
    if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(f"no such timers on {sys.platform}")
    for name in (None, "librt.so.1"):  # Of libc itself since glibc 2.34.
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
"""Exit status of a process that its watchdog has ended: the same command goes on from the newest
checkpoint."""

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
"""How many times `train.stall_minutes` a phase may last without moving."""

SLOW_STEPS = 20
"""Nor is a run ended before it has not moved for the time of so many steps."""


class Watchdog:
    """Ends a process that has not moved for too long, with status 75, once all stacks are dumped.

    `log` is a real file: what is written there and on stderr names the function that is stuck in
    every thread. Where even this thread cannot run, because a C call keeps Python's lock, stacks
    are dumped and the process is ended by timers in C.
    """

    def __init__(
        self,
        phases: Phases,
        stall_minutes: float,
        log: TextIO,
        before_exit: Callable[[], None] = lambda: None,
        grace: float = 10.0,
    ):
        """With 0 `stall_minutes` it does nothing. `grace` seconds pass between dump and end: others
        that are stuck with this process dump theirs, and what moves on after all is let be."""
        self._phases = phases
        self._base = 60 * stall_minutes
        self._log = log
        self._before_exit = before_exit
        self._grace = grace
        self._tick = min(5.0, self._base / 20)
        self._ended = threading.Event()
        # A terminal may stop a process (Ctrl-Z) while timers in C run on: they would then end it.
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
        """Returns the seconds without moving after which the process is ended now; None: never."""
        if not self._base:
            return None
        median = self._phases.median_step_seconds()
        if median is None:  # Nobody knows yet what a step takes.
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
                # A process that was itself stopped (Ctrl-Z), or got no time, has not been stuck.
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
        """Dumps all stacks, and returns whether it has not moved meanwhile either."""
        message = (
            f"no progress for {still:.0f} s while {self._phases.now}, after step "
            f"{self._phases.num_steps}; the limit is {limit:.0f} s (config.train.stall_minutes)"
        )
        logging.error("%s; the stacks of all threads:", message)
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
        # The loop's thread would be waited for at an orderly exit.
        os._exit(STALLED_STATUS)

    def _arm_last_resort(self, seconds: float) -> None:
        """Timers in C, which go off unless this thread comes to set them anew."""
        seconds += 2 * (self._tick + self._grace) + FINAL_SECONDS
        exits = self._is_alone and self._exit_timer is None  # With status 1.
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
    """Heartbeat and watchdog of a process while it trains.

    Args:
      folder: the workdir.
      phases: what the process does.
      process, num_processes, total: of the heartbeat.
      stall_minutes: of the watchdog.
      log: the host's log, where stacks go.
      stopped: exceptions of a run that was told to stop.
    """

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
    """Returns the longest of all stages; 0, which is for ever, where one says so."""
    minutes = [stage.train.stall_minutes for stage in stages]
    return max(minutes) if all(minutes) else 0.0


def _exit_timer() -> ExitTimer | None:
    try:
        return ExitTimer(STALLED_STATUS)
    except OSError:
        return None


def _has_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:  # There is no standard input.
        return False
