"""A run of several processes: how they join, what they must have in common, and how they end."""

import contextlib
import importlib.metadata
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax

from alignvlm_jax import logs
from alignvlm_jax.errors import StoppedError, TryAgainError, UserError
from alignvlm_jax.parallel import exchange, peers
from alignvlm_jax.parallel.peers import Watch

START_TIMEOUT_SECONDS = 60
SLICE_TIMEOUT_SECONDS = 270
"""Time for all hosts of a TPU slice to join: less than jax's own 300, so that our error comes
first."""
MAX_CLOCK_SECONDS = 60
"""The most by which clocks of hosts may differ: logs and leases are compared by them."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_watch: Watch | None = None


def initialize(arguments: list[str] | None = None) -> None:
    """Joins the other processes of the run, where the environment names them; does nothing for a
    single process, or one that has joined before.

    The launch scripts set ALIGNVLM_COORDINATOR (host:port), ALIGNVLM_NUM_PROCESSES and
    ALIGNVLM_PROCESS_ID; or, on the hosts of a TPU slice, which know of each other,
    ALIGNVLM_AUTO_DISTRIBUTED=1.

    Args:
      arguments: the command's arguments, which must be the same on all processes.

    Raises:
      UserError: some of the variables are missing or no numbers, this is no host of a TPU slice, or
        library versions, arguments or clocks of the processes differ.
      TryAgainError: the processes do not all join in time.
    """
    global _watch
    if exchange.client() is None:
        _join()
    if exchange.client() is not None and jax.process_count() > 1:
        _watch = _watch or Watch()
        # jax's coordination service has installed a handler of its own, which notes the signal and
        # lets the process go on.
        signal.signal(signal.SIGTERM, _stop)
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
        check_alike(
            {
                "Python": platform.python_version(),
                **versions,
                "arguments": " ".join(arguments or []),
            }
        )
        _check_clocks()


def _join() -> None:
    """Initialises jax's distributed runtime as the environment says; does nothing without it."""
    if os.environ.get("ALIGNVLM_AUTO_DISTRIBUTED") == "1":
        message = "the hosts of the slice did not all come"
        try:
            with _ended_after(SLICE_TIMEOUT_SECONDS, f"{message} within {SLICE_TIMEOUT_SECONDS} s"):
                jax.distributed.initialize()
        except RuntimeError as err:
            raise TryAgainError(f"{message} ({str(err).splitlines()[0]})") from err
        except ValueError as err:
            raise UserError(
                "ALIGNVLM_AUTO_DISTRIBUTED is 1, and this machine does not know the other hosts "
                f"of a TPU slice ({str(err).splitlines()[0]})"
            ) from err
        return
    names = ("ALIGNVLM_COORDINATOR", "ALIGNVLM_NUM_PROCESSES", "ALIGNVLM_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return
    if not all(values):
        missing = ", ".join(name for name, value in zip(names, values, strict=True) if not value)
        raise UserError(
            f"{missing} not set: a run of several processes needs all of {', '.join(names)}"
        )
    address = values[0]
    count = _number(names[1], values[1])
    index = _number(names[2], values[2])
    if index >= count:
        raise UserError(
            f"{names[2]} is {index}; with {names[1]} {count} it is one of 0 to {count - 1}"
        )
    message = (
        f"process {index} of {count} waited {START_TIMEOUT_SECONDS} s at {address} for the "
        f"others: start all {count} within a minute of each other"
    )
    try:
        with _ended_after(START_TIMEOUT_SECONDS, message):
            # Later than our own: at its time-out jax aborts the process.
            timeout = 2 * START_TIMEOUT_SECONDS
            jax.distributed.initialize(address, count, index, initialization_timeout=timeout)
    except RuntimeError as err:
        raise TryAgainError(f"{message} ({str(err).splitlines()[0]})") from err


def _stop(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM where no command does: raises StoppedError; a second SIGTERM kills."""
    signal.signal(number, signal.SIG_DFL)
    raise StoppedError("stopped by SIGTERM; the same command goes on with what is left")


@contextlib.contextmanager
def _ended_after(seconds: float, message: str) -> Iterator[None]:
    """A context that ends this process with the message and status 75 when it lasts longer than
    `seconds`: at its own time-out jax aborts the process, with a C++ stack trace and no error."""

    def end() -> None:
        logs.say(f"alignvlm_jax: error: {message}")
        os._exit(peers.LOST)  # The main thread is inside jax, where no exception reaches it.

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def leave() -> None:
    """Waits until every process leaves, and shuts jax's distributed runtime down.

    Process 0 holds the coordination service: were it to end first, it would take the others with
    it.
    """
    global _watch
    if _watch is not None:
        # Before the watch stops: a process that has left is silent, and would be taken for lost.
        exchange.barrier()
        _watch.stop()
        _watch = None
    jax.distributed.shutdown()


def fail(message: str, status: int) -> int:
    """Tells the other processes that this one ends, and why; does nothing for a single process.

    Returns the exit status to end with: another process's, where its failure is the reason.
    """
    return status if _watch is None else _watch.fail(message, status)


def check_alike(facts: Mapping[str, Any | Callable[[], Any]]) -> None:
    """Raises UserError on all processes where a fact is not the same on all of them.

    A difference between hosts would show at some later point, as a hang or as wrong numbers. A fact
    that takes time to find is given as a function, which a run of a single process does not call.
    """
    if jax.process_count() == 1:
        return
    if found := exchange.differing(
        {name: fact() if callable(fact) else fact for name, fact in facts.items()}
    ):
        name, values = next(iter(found.items()))
        # The first process that differs from process 0 is named.
        process = next(i for i, value in enumerate(values) if value != values[0])
        raise UserError(
            f"the processes differ in {', '.join(found)}: {name} is {values[0]!r} on process 0 and "
            f"{values[process]!r} on process {process}; start all of them with the same"
        )


def _check_clocks() -> None:
    """Raises UserError where the clocks of the processes differ by more than MAX_CLOCK_SECONDS."""
    # Reading the clocks right after a barrier bounds what waiting for each other adds to the
    # spread.
    exchange.barrier()
    times = exchange.gather(time.time())
    spread = max(times) - min(times)
    if spread > MAX_CLOCK_SECONDS:
        behind = times.index(min(times))
        raise UserError(
            f"the clocks of the processes differ by {spread:.0f} s, and at most "
            f"{MAX_CLOCK_SECONDS} s will do; that of process {behind} is the furthest behind: set "
            "it right (chrony, NTP)"
        )


def _number(name: str, text: str) -> int:
    """Returns the number in an environment variable; UserError where it holds none."""
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; it must be a whole number from 0")
    return int(text)


def is_main() -> bool:
    """Whether this process is the one that writes logs and reports."""
    return jax.process_index() == 0
