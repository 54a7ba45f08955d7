"""A process beside this one in which functions run that may hang, take all memory or crash.

Files of the web do all of that to libraries of PDFs and images, within their own code, where Python
can stop nothing: so these run in a process that can be ended. A worker of `prepare`, or whoever
asks a model about a page, has one such process; it waits for it and so hears Ctrl-C.
"""

import contextlib
import ctypes
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

from alignvlm_jax.errors import UserError

MAX_SECONDS = 30.0
"""CPU time of a call. Not the clock's: on a busy machine a good page may wait for minutes."""
MAX_WAIT = 20 * MAX_SECONDS
"""Seconds by the clock, for what waits without working, or where CPU time is not known."""
MAX_BYTES = 2 << 30
"""Resident memory of the process: a page of A3 at 600 dpi takes a third of it."""
POLL_SECONDS = 0.1
READY = b"ready for calls\n"
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class CallEnded(UserError):
    """A call that took too much time or memory, or crashed; the message says which."""


class Sandbox:
    """Runs functions in a process of its own, which is started when it is first needed, and again
    after it was ended.

    Args:
      max_seconds: CPU time of a call; None for MAX_SECONDS.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self._max_seconds = max_seconds
        self._process: subprocess.Popen | None = None
        # One call at a time: a runner of `prepare` may have several threads.
        self._lock = threading.Lock()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), which was run in the other process.

        Args:
          function: of a module, so that it can be pickled.
          *args: picklable, as is what it returns or raises.

        Raises:
          CallEnded: it took too long or too much memory, or crashed twice.
          UserError: the process cannot be started.
          Exception: whatever the function raised.
        """
        with self._lock:
            crash = self._try(function, args)
            if isinstance(crash, _Crash):
                # Once more, in a new process: the kernel may have ended this one for the memory of
                # others.
                crash = self._try(function, args)
            if isinstance(crash, _Crash):
                raise CallEnded(f"the library that reads it crashed ({crash.signal})")
            is_error, value = crash
        if is_error:
            raise value
        return value

    def close(self) -> None:
        """Ends the process, if there is one."""
        process = self._process
        self._process = None
        if process is None:
            return
        process.kill()
        process.wait()
        # What was not yet written has nobody to read it.
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()

    def _try(self, function: Callable[..., Any], args: tuple) -> "tuple[bool, Any] | _Crash":
        """Returns what a call gave, as `_serve` answers, or how the process died."""
        process = self._process = self._process or _start()
        try:
            pickle.dump((function, args), process.stdin)
            process.stdin.flush()
            self._wait(process)
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            # Dead, or to be: of what it says no more can be understood.
            self.close()
            status = process.returncode
            return _Crash(signal.Signals(-status).name if status < 0 else f"status {status}")
        except BaseException:
            # Also for Ctrl-C: what the process is at would be the answer to the next call.
            self.close()
            raise

    def _wait(self, process: subprocess.Popen) -> None:
        """Waits for the begin of an answer; raises CallEnded for what takes too much meanwhile."""
        most = self._max_seconds or MAX_SECONDS
        began = time.monotonic()
        spent = _cpu_seconds(process.pid)
        while not select.select([process.stdout], [], [], POLL_SECONDS)[0]:
            if _cpu_seconds(process.pid) - spent > most:
                raise CallEnded(f"it takes more than {most:.0f} s of CPU time")
            if time.monotonic() - began > MAX_WAIT:
                raise CallEnded(f"it takes more than {MAX_WAIT:.0f} s")
            if _resident_bytes(process.pid) > MAX_BYTES:
                raise CallEnded(f"it takes more than {MAX_BYTES / 2**30:.3g} GiB of memory")


class _Starter:
    """Starts processes in one thread, which lives as long as this process.

    Linux ends them with the thread that started them: one of a server may live for one request.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[futures.Future] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> subprocess.Popen:
        """Returns a process that runs `serve`, not yet ready; raises OSError if there is none."""
        with self._lock:
            # A fork has no threads: there is none there, and what it waited on is of no use.
            if self._thread is None or not self._thread.is_alive():
                self._orders = queue.SimpleQueue()
                self._thread = threading.Thread(
                    target=_start_each, args=[self._orders], daemon=True
                )
                self._thread.start()
            order = futures.Future()
            self._orders.put(order)
        return order.result()


def _start_each(orders: "queue.SimpleQueue[futures.Future]") -> None:
    """Starts a process for each order, for ever."""
    # Not multiprocessing: workers are daemons there, which may have no children.
    # -P: the folder that this was started in is no place to import from.
    code = f"from {__name__} import serve; serve()"
    while True:
        order = orders.get()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
            )
        except Exception as err:  # for whoever waits
            order.set_exception(err)
        else:
            order.set_result(process)


_starter = _Starter()


class _Crash:
    """The death of the process, by the name of a signal or with an exit status."""

    def __init__(self, signal_name: str):
        self.signal = signal_name


def _start() -> subprocess.Popen:
    process = _starter.start()
    # What modules print while they are imported would stand among the answers.
    while line := process.stdout.readline():
        if line == READY:
            return process
    status = process.wait()
    raise UserError(
        f"the process that reads files cannot be started (status {status}); it says why above"
    )


def serve() -> None:
    """Answers calls until the parent closes the pipe: (False, result) or (True, exception)."""
    # Ctrl-C reaches the whole process group: the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # In the midst of a hanging call nothing else would end this process with its parent; see
        # `_Starter`.
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    calls = sys.stdin.buffer
    sys.stdout.flush()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a library prints would stand among the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answers.write(READY)
    answers.flush()
    while True:
        try:
            function, args = pickle.load(calls)
        except EOFError:
            return
        try:
            answer = (False, function(*args))
        except Exception as err:
            answer = (True, err)
        try:
            content = pickle.dumps(answer)
            pickle.loads(content)
        except Exception as err:  # Of what a library raises not all comes through a pipe.
            content = pickle.dumps((True, RuntimeError(f"{answer[1]!r} ({err})")))
        answers.write(content)
        answers.flush()


def _cpu_seconds(pid: int) -> float:
    """Returns the CPU time that a process has used; 0 where that is not known."""
    try:
        # The name in parentheses may hold anything; user and system time are the 12th and 13th
        # field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS
    except (OSError, IndexError, ValueError):
        return 0.0


def _resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process; 0 where that is not known."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
