"""The watch that processes of a run keep on each other: one that fails or is lost ends all of them,
soon and with a reason.

Without it the others would wait in their next collective until the coordination service misses
heartbeats, minutes later, and then abort with its message in the place of ours.
"""

import contextlib
import os
import platform
import threading
import time

import jax

from alignvlm_jax import logs, storage
from alignvlm_jax.errors import TRY_AGAIN_STATUS
from alignvlm_jax.parallel import exchange

LOST_SECONDS = 60
"""A process that has not been heard of for this long is taken for dead."""
BEAT_SECONDS = 2
LEAVE_SECONDS = 15
"""The longest that a process that ends waits for the others to hear of it."""
UNFORESEEN = 70
"""Exit status of an exception that nobody expected."""
LOST = TRY_AGAIN_STATUS
VAGUE = (UNFORESEEN, LOST)
"""Statuses of a process that may have failed only because another one ended."""


class Watch:
    """A thread that tells the other processes that this one lives, and ends this one when another
    fails or is lost."""

    def __init__(self) -> None:
        self._index = jax.process_index()
        self._count = jax.process_count()
        self._ending = threading.Lock()  # of two reasons to end only the first is told
        self._stopped = threading.Event()
        self._heard: dict[str, tuple[int, float]] = {}
        exchange.say(f"host/{self._index}", platform.node())
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; from then on no process is watched."""
        self._stopped.set()
        self._thread.join()

    def fail(self, message: str, status: int) -> int:
        """Tells the other processes why this one ends, and waits until they have heard; they end
        with the same status.

        Returns the status to end with. An unforeseen error, or one that may pass, is mostly the
        effect of another process's end: then the status and the message are that process's.
        """
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # The thread is about to end this process.
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Nobody can be told.
            others = {
                process: told
                for process, told in exchange.announced("failed").items()
                if process != str(self._index)
            }
            if status in VAGUE and others:
                # The first process whose status is not vague itself, if any, knows the cause.
                process, told = min(others.items(), key=lambda one: one[1]["status"] in VAGUE)
                message = f"{self._name(process)}: {told['message']}"
                status = told["status"]
                if self._index == 0:
                    logs.say(f"alignvlm_jax: error: {message}")
            exchange.say(f"failed/{self._index}", {"message": message, "status": status})
            self._wait_for_others()
        return status

    def _watch(self) -> None:
        beat = 0
        while not self._stopped.wait(BEAT_SECONDS):
            beat += 1
            try:
                exchange.say(f"alive/{self._index}", beat)
                failed = exchange.announced("failed")
                lost = self._lost() if self._index == 0 else None
            except jax.errors.JaxRuntimeError:
                if not self._stopped.is_set():
                    self._end("the main process is gone, and with it the run", LOST)
                continue
            if failed:
                process, told = next(iter(failed.items()))
                # All processes may have failed for the same reason: each gets the time to say so
                # itself.
                time.sleep(BEAT_SECONDS)
                self._end(f"{self._name(process)}: {told['message']}", told["status"])
            elif lost is not None:
                self._end(
                    f"{self._name(lost)} has not been heard of for {LOST_SECONDS} s: it died, or "
                    "is cut off",
                    LOST,
                )

    def _lost(self) -> str | None:
        """Returns the process from which no new beat has come for LOST_SECONDS, if any.

        Beats are counters and their ages are measured here: clocks of hosts need not agree.
        """
        now = time.monotonic()
        beats = exchange.announced("alive")
        for process in map(str, range(self._count)):
            beat = beats.get(process, 0)
            if self._heard.get(process, (-1, 0.0))[0] != beat:
                self._heard[process] = beat, now
            elif now - self._heard[process][1] > LOST_SECONDS:
                return process
        return None

    def _name(self, process: str) -> str:
        hosts: dict[str, str] = {}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # The service may go meanwhile.
            hosts = exchange.announced("host")
        return f"process {process} of {self._count} ({hosts.get(process, 'an unknown host')})"

    def _end(self, message: str, status: int) -> None:
        """Ends this process with the message and the status, from the thread."""
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return  # The main thread is on its way out by itself.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._index == 0:
                logs.say(f"alignvlm_jax: error: {message}")
                exchange.say("failed/0", {"message": message, "status": status})
            self._wait_for_others()
        # In a thread with a bound: a storage that hangs must not keep a dead run alive. os._exit,
        # since the main thread may be stuck in a collective, where no exception reaches it.
        writing = threading.Thread(target=_write_out, daemon=True)
        writing.start()
        writing.join(LEAVE_SECONDS)
        os._exit(status)

    def _wait_for_others(self) -> None:
        """Announces that this process leaves; the main process then waits until all others do.

        The coordination service ends with the main process, and would abort the others without a
        reason.
        """
        exchange.say(f"left/{self._index}", True)
        if self._index:
            return
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            gone = exchange.announced("left").keys() | exchange.announced("failed").keys()
            if len(gone) == self._count:
                break
            time.sleep(0.1)
        time.sleep(1)  # The others have announced their end, and still have to end.


def _write_out() -> None:
    """Writes out what os._exit would lose: metrics not yet written and the end of the log; and
    releases the lock on the workdir."""
    storage.close_all()
    logs.ship_all()
