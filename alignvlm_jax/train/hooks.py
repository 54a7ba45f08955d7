"""Hooks around the steps of a run: signals that stop it, and an xprof trace of some steps."""

import contextlib
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import exchange

PROFILE_FOLDER = "profile"
ENDINGS = (".xplane.pb", ".trace.json.gz")


def profile_range(stages: Sequence[Config]) -> range | None:
    """Returns the steps of the run that `config.train.profile` asks to trace; None for none.

    Raises:
      UserError: stages name different steps, or steps that the run does not have.
    """
    requested = sorted({stage.train.profile for stage in stages} - {""})
    if not requested:
        return None
    if len(requested) > 1:
        raise UserError(
            f"config.train.profile is {' and '.join(map(repr, requested))} in different stages: "
            "steps are counted over the run, and one part of them is traced; set it once"
        )
    begin, end = map(int, re.fullmatch(r"(\d+):(\d+)", requested[0]).groups())
    total = sum(stage.train.num_steps for stage in stages)
    if not 1 <= begin < end <= total + 1:
        best = max(1, min(begin, total))
        raise UserError(
            f"config.train.profile is {requested[0]!r}, and the run has steps 1 to {total}: "
            "FIRST:END traces from FIRST up to and not including END; nearest: "
            f"'{best}:{min(max(end, best + 1), total + 1)}'"
        )
    return range(begin, end)


class Profiler:
    """A tracer of some steps of a run, with a file for each process in WORKDIR/profile:

        profile/plugins/profile/steps-BEGIN-END/host-N.xplane.pb

    This is where xprof and TensorBoard expect it. A trace that cannot be written is reported, and
    the run continues, since nothing depends on it.
    """

    def __init__(self, folder: Path, steps: range | None, process: int, say: Callable[[str], None]):
        """Prepares the tracer.

        Args:
          folder: the workdir.
          steps: the steps to trace, as `profile_range` returns them.
          process: number of this process.
          say: called with messages for the user.
        """
        self._folder = folder / PROFILE_FOLDER
        self._steps = steps or range(0)
        self._process = process
        self._say = say
        self._local: tempfile.TemporaryDirectory | None = None
        self._first = self._newest = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._local:
            self._stop(f"the run ended after step {self._newest}")

    def resume(self, newest: int) -> None:
        """Reports which of the steps to trace are past, if a run resumes after step `newest`."""
        if self._steps and newest >= self._steps.start:
            left = (
                f"steps {newest + 1} to {self._steps[-1]}"
                if newest < self._steps[-1]
                else "nothing"
            )
            self._say(f"config.train.profile: steps up to {newest} are done already; traces {left}")

    @contextlib.contextmanager
    def step(self, number: int, wait: Callable[[], Any]) -> Iterator[None]:
        """A context in which a step is dispatched, which names it in the trace.

        The first step to trace starts the trace.

        Args:
          number: number of the step in the run.
          wait: returns once all steps that were dispatched so far have ended.
        """
        if number not in self._steps:
            yield
            return
        if self._local is None:
            # Steps are dispatched ahead of the device: those before would run into the trace.
            wait()
            self._start(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        self._newest = number

    def after_step(self, number: int, wait: Callable[[], Any]) -> None:
        """Ends and writes the trace, if step `number` is its last, once `wait` has seen it end."""
        if self._local and number == self._steps[-1]:
            wait()
            self._stop("")

    def _start(self, number: int) -> None:
        """Starts a trace that begins with step `number`."""
        # In a local folder: JAX cannot write to a bucket, and it names files by host alone, which
        # two processes of a host would share.
        self._local = tempfile.TemporaryDirectory(prefix="profile-")
        self._first = self._newest = number
        jax.profiler.start_trace(self._local.name)

    def _stop(self, early: str) -> None:
        """Ends the trace and copies it to the workdir; `early` says why if steps are missing."""
        local = self._local
        self._local = None
        # First of all: even if something fails below, no second trace begins.
        self._steps = range(0)
        target = self._folder / "plugins" / "profile" / f"steps-{self._first}-{self._newest + 1}"
        with local:
            try:
                jax.profiler.stop_trace()
                for source in Path(local.name).rglob("*"):
                    if source.is_file():
                        target.mkdir(parents=True, exist_ok=True)
                        storage.copy_file(
                            source, target / f"host-{self._process}{ending(source.name)}"
                        )
            except (OSError, RuntimeError) as err:
                self._say(
                    f"the profile of steps {self._first} to {self._newest} cannot be written: {err}"
                )
                return
        because = f" ({early})" if early else ""
        self._say(f"profile of steps {self._first} to {self._newest}{because}: {self._folder}")


def ending(name: str) -> str:
    """Returns the ending of the name of a trace's file, as ".xplane.pb"."""
    # Not the suffix: names begin with the host's, which may have dots, and endings have two parts.
    return next((known for known in ENDINGS if name.endswith(known)), Path(name).suffix)


SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_FOLDER = "stop"
"""Folder of `exchange.say` in which processes announce that they were told to stop."""


class StopSignal:
    """A context that notes the first SIGINT or SIGTERM; a second one acts as if it were not caught.

    A signal is told at once, on the terminal and with several processes to the others, even while
    this one waits for a device: Python would call its handler only after that, a whole training
    step later.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        """
        Args:
          say: shows a line on the terminal, from another thread.
        """
        self._say = say
        self._requested = False
        self.number = signal.SIGTERM
        """Of the signal that stops the run. Of several processes it is SIGTERM: whichever of them
        heard what, all end with one status, which launch scripts know."""
        self._before: dict[signal.Signals, object] = {}
        self._teller: contextlib.ExitStack = contextlib.ExitStack()

    def __enter__(self) -> "StopSignal":
        self._teller.enter_context(_telling(self._say))
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if jax.process_count() > 1:
            # Not the handler that was there, that of `distributed`: at a second signal it would
            # save once more.
            self._before[signal.SIGTERM] = signal.SIG_DFL
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        self._teller.close()

    def seen(self) -> bool:
        """Whether this process knows of a signal, its own or (in the main process) any other's.

        The main process decides for all; see `requested`.
        """
        if self._requested or jax.process_count() == 1 or jax.process_index() != 0:
            return self._requested
        return bool(exchange.announced(STOP_FOLDER))

    def requested(self) -> bool:
        """Whether any process was told to stop, as the main process knows it.

        A collective: all processes call it at the same step, and so leave together.
        """
        return exchange.from_main(self.seen())

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handles the first signal, and puts the earlier handlers back for the second."""
        self._requested = True
        if jax.process_count() == 1:
            self.number = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _telling(say: Callable[[str], None]) -> Iterator[None]:
    """A context in which a thread tells of a signal as soon as it comes: `say` of the first, and
    the other processes of all."""
    # set_wakeup_fd demands a non-blocking descriptor: a handler must never wait.
    heard, written = socket.socketpair()
    written.setblocking(False)

    def tell() -> None:
        is_first = True
        # One byte a signal, its number; an empty read means that the other end is closed.
        while number := heard.recv(1):
            if number[0] not in SIGNALS:
                continue
            # The others first: the terminal may be gone.
            if jax.process_count() > 1:
                exchange.say(f"{STOP_FOLDER}/{jax.process_index()}", number[0])
            if is_first:
                is_first = False
                with contextlib.suppress(OSError, ValueError):
                    say("told to stop: after this step, with a checkpoint")

    thread = threading.Thread(target=tell, name="stop", daemon=True)
    thread.start()
    # The C library's handler writes here, whatever the main thread is at.
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        written.close()
        thread.join()
        heard.close()
