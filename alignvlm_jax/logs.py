"""Logs of a process: a file for each process, WORKDIR/logs/host-N.log, and the terminal.

The file gets everything: our own messages, those of libraries (through absl and Python's logging),
Python's warnings, stacks of crashes, and tracebacks of errors. The terminal gets only our own
lines, or everything with --debug or ALIGNVLM_DEBUG=1.
"""

import contextlib
import faulthandler
import importlib.metadata
import logging
import os
import platform
import shlex
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from absl import logging as absl_logging

from alignvlm_jax import __version__, storage
from alignvlm_jax.storage import appending

FOLDER = "logs"
PACKAGE = Path(__file__).parent
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")
ENVIRONMENT = ("XLA_", "LIBTPU_", "JAX_", "TPU_", "ALIGNVLM_", "GRPC_", "NCCL_")
"""Prefixes of the environment variables that are logged."""

SHIP_SECONDS = 60.0
LAST_SECONDS = 20.0
"""Longest time that the storage may take at the end; then the rest is given up."""

# In seconds: more than eleven days.
NEVER = 1e6
MAX_KEPT = 10_000


class Kept(logging.Handler):
    """A handler that keeps the first `MAX_KEPT` messages until there is a file for them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.records) < MAX_KEPT:
            self.records.append(record)

    def hand_over(self, handler: logging.Handler) -> None:
        """Passes the messages to another handler and forgets them."""
        for record in self.records:
            handler.handle(record)
        self.records.clear()


class Terminal(logging.StreamHandler):
    """A handler for stderr: of all messages for debugging, else of warnings without a log file.

    Without debugging, messages that libraries log through absl are left out: orbax logs tracebacks
    of errors that we report in one line.
    """

    def __init__(self, debug: bool):
        super().__init__(sys.stderr)
        self.setFormatter(
            absl_logging.PythonFormatter() if debug else logging.Formatter("%(message)s")
        )
        self._debug = debug

    def filter(self, record: logging.LogRecord) -> bool:
        # Our messages go through absl's logger as well: only the source file tells whose they are.
        is_ours = Path(record.pathname).is_relative_to(PACKAGE)
        is_told = record.levelno >= logging.WARNING and (is_ours or record.name != "absl")
        return self._debug or (is_told and not _open_logs)


class Lines(logging.StreamHandler):
    """A handler for a file, which reports only once that the file cannot be written."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._is_told:
            self._is_told = True
            say(f"cannot write the log {self.stream.name}: {sys.exc_info()[1]}")


def say(line: str) -> None:
    """Prints a line on stderr; an error in doing so is ignored, since stderr may be a full disk."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


_open_logs: list["HostLog"] = []
_kept: list[Kept] = []


@contextlib.contextmanager
def collected(debug: bool) -> Iterator[None]:
    """A context in which messages wait for the host's log, and go to the terminal (`Terminal`),
    with `debug` all of them."""
    kept = Kept()
    terminal = Terminal(debug)
    with _handling(kept), _handling(terminal):
        _kept.append(kept)
        try:
            yield
        finally:
            _kept.remove(kept)


class HostLog:
    """The log file of this process, which is written while entered.

    A log in a bucket is written to a local file first, where stacks can go even if nothing else
    works any more. What is new in it is sent every `ship_seconds`, and at the end.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        process: int,
        num_processes: int,
        commit: str,
        ship_seconds: float = SHIP_SECONDS,
    ):
        self.path = workdir / FOLDER / f"host-{process}.log"
        self._rank = f"process {process} of {num_processes}"
        self._commit = commit
        self._ship_seconds = ship_seconds
        self._shipper: Shipper | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "HostLog":
        """Opens the file; raises OSError if it cannot be written."""
        if storage.is_bucket(self.path):
            self.file: TextIO = self._stack.enter_context(
                tempfile.NamedTemporaryFile("a", buffering=1, suffix=".log")
            )
            self._shipper = Shipper(Path(self.file.name), self.path)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Buffered by lines: a kill leaves no line behind in memory.
            self.file = self._stack.enter_context(self.path.open("a", buffering=1))
        problem = f"cannot write {self.path} now"
        # Entered before the handlers, and so left after them: its last run sends what they wrote
        # last.
        self._stack.enter_context(Repeated(self.ship, self._ship_seconds, problem))
        handler = Lines(self.file)
        handler.setFormatter(absl_logging.PythonFormatter())
        self._stack.enter_context(_handling(handler))
        self._stack.enter_context(_warnings_logged())
        self._stack.enter_context(_crashes_dumped(self.file))
        _open_logs.append(self)
        self._stack.callback(_open_logs.remove, self)
        # The file begins with what was logged before there was a workdir.
        for kept in _kept:
            kept.hand_over(handler)
        for line in _facts(self._rank, self._commit):
            absl_logging.info("%s", line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, *_: object
    ) -> None:
        # If an error is on its way out, a full disk must not replace it.
        with (
            contextlib.nullcontext() if kind is None else contextlib.suppress(OSError),
            self._stack,
        ):
            if kind is None:
                absl_logging.info("ended")
            else:
                absl_logging.error("ended by %s: %s", kind.__name__, err, exc_info=err)

    def ship(self) -> None:
        """Sends what is new to the storage."""
        if self._shipper:
            self._shipper.ship()
        else:
            os.fsync(self.file.fileno())  # a mounted bucket uploads only then


class Shipper:
    """A sender of what is new in a local file to an object in a bucket."""

    def __init__(self, source: Path, target: Path):
        self._source = source
        self._target = target
        self._sent = 0
        self._appender: appending.Appender | None = None
        self._lock = threading.Lock()

    def ship(self) -> None:
        """Sends what is new; if that fails it is sent by the next call.

        Raises:
          OSError, UserError: the storage does not take it.
        """
        with self._lock:
            if self._appender is None:
                # Its own clock is off, because errors there would go unnoticed: `sync` below is
                # what sends, called by `Repeated`.
                self._appender = appending.Appender(self._target, every=NEVER)
            # Counted as sent once appended: the appender keeps what `sync` could not write.
            with self._source.open("rb") as file:
                file.seek(self._sent)
                new = file.read()
            self._appender.append(new)
            self._sent += len(new)
            self._appender.sync()


class Repeated:
    """A thread that repeats an action while entered, and runs it once at the end.

    A failure is logged once, and the action is tried again. At the end it is waited for no longer
    than `LAST_SECONDS`.
    """

    def __init__(self, action: Callable[[], None], every: float, problem: str):
        self._action = action
        self._every = every
        self._problem = problem
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def __enter__(self) -> "Repeated":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(LAST_SECONDS)

    def _run(self) -> None:
        told = ended = False
        while not ended:
            ended = self._ended.wait(self._every)
            try:
                self._action()
                told = False
            except Exception as err:  # nothing may end this thread
                if not told:
                    absl_logging.warning("%s: %s", self._problem, err)
                told = True


def ship_all() -> None:
    """Sends what is new in all open logs, before the process is ended without leaving them."""
    for log in list(_open_logs):
        log.ship()


def is_debugging(argv: list[str]) -> bool:
    """Whether the command line or the environment asks for tracebacks and all messages."""
    return "--debug" in argv or os.environ.get("ALIGNVLM_DEBUG", "") not in ("", "0")


def _facts(rank: str, commit: str) -> Iterator[str]:
    """Yields the first lines of a log: host, versions, commit, command and environment."""
    yield (
        f"{rank}: host {socket.gethostname()}, pid {os.getpid()}, {os.cpu_count()} cores, "
        f"{platform.platform()}"
    )
    versions = {"alignvlm_jax": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"commit: {commit}"
    yield f"command: {shlex.join(sys.orig_argv)}"
    yield f"folder: {os.getcwd()}"
    for name in sorted(os.environ):
        if name.startswith(ENVIRONMENT):
            yield f"environment: {name}={os.environ[name]}"


@contextlib.contextmanager
def _handling(handler: logging.Handler) -> Iterator[None]:
    """A context in which the root logger has a handler, and messages from INFO on."""
    # Without any handler absl would add one of its own for the terminal.
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@contextlib.contextmanager
def _warnings_logged() -> Iterator[None]:
    """A context in which Python's warnings are logged."""
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)


@contextlib.contextmanager
def _crashes_dumped(file: TextIO) -> Iterator[None]:
    """A context in which a crash in C, or `kill -USR1 PID`, dumps all stacks to a file."""
    was_enabled = faulthandler.is_enabled()
    # It keeps the file's descriptor: it has to be disabled before the file is closed.
    faulthandler.enable(file=file)
    faulthandler.register(signal.SIGUSR1, file=file)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR1)
        faulthandler.disable()
        # It was on before, to stderr, as pytest has it.
        if was_enabled:
            faulthandler.enable(file=sys.__stderr__)
