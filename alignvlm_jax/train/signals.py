"""SIGINT and SIGTERM as a wish that the loop honours between two steps."""

import contextlib
import signal
import socket
import threading
from types import FrameType

import jax

from alignvlm_jax.parallel import exchange

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FOLDER = "stop"
"""Of `exchange.say`, where processes leave that they were told to stop."""


class StopSignal:
    """While entered, the first signal is noted; the second acts as if nobody had caught it.

    Of several processes each tells the others at once, also while it waits for a device: Python would call its handler
    only after that, a whole training step later.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[signal.Signals, object] = {}
        self._teller: contextlib.ExitStack = contextlib.ExitStack()

    def __enter__(self) -> "StopSignal":
        if jax.process_count() > 1:
            self._teller.enter_context(_telling())
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if jax.process_count() > 1:
            self._before[signal.SIGTERM] = signal.SIG_DFL  # Not that of `distributed`, which would save once more.
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        self._teller.close()

    def seen(self) -> bool:
        """Whether this process knows of a signal: of another's only the main one, which decides for all. See
        `requested`."""
        if self._requested or jax.process_count() == 1 or jax.process_index() != 0:
            return self._requested
        return bool(exchange.said(FOLDER))

    def requested(self) -> bool:
        """Whether any process was told to stop, as the main process has it. All must ask at the same point: they leave
        together."""
        return exchange.from_main(self.seen())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _telling():
    """While entered, a thread tells the other processes of a signal as soon as it comes."""
    heard, written = socket.socketpair()
    written.setblocking(False)

    def tell() -> None:
        while number := heard.recv(1):
            if number[0] in SIGNALS:
                exchange.say(f"{FOLDER}/{jax.process_index()}", number[0])

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
