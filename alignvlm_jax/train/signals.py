"""SIGINT and SIGTERM as a wish that the loop honours between two steps."""

import signal
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While entered, the first signal is noted; the second acts as if nobody had caught it."""

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Whether any process was told to stop. Every process must ask at the same point: they leave together."""
        if jax.process_count() == 1:
            return self._requested
        return bool(multihost_utils.process_allgather(np.asarray(self._requested)).any())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
