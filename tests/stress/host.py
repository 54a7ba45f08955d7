"""One process of a run under stress: the command itself, told from outside in which phase it is.

`python -m tests.stress.host COMMAND ...` does what `python -m alignvlm_jax COMMAND ...` does, and
appends to the file of STRESS_EVENTS a line of JSON for each phase that begins, and one for each
batch that it trains on: stage, row, the records in it, and a checksum of its arrays.

    STRESS_SLICE         devices stand in the mesh as on this slice (tests.pod.slices)
    STRESS_SETTINGS      JSON, {"module.NAME": value}: times that would make the tests long
    STRESS_CLOCK         seconds by which the clock of this host is ahead
    STRESS_VERSION       of optax, as this host says it
    STRESS_CWD           the folder of the command
    STRESS_DELAY         seconds before it begins
    STRESS_SLOW          seconds before each batch
    STRESS_QUIET         1: no events
"""

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import sys
import time
import zlib
from typing import Any

DURATIONS = {
    "alignvlm_jax.storage.bucket_requests.MAX_PAUSE": 0.5,
    # A machine with other work may start one of two processes minutes after the other.
    "alignvlm_jax.parallel.distributed.START_TIMEOUT_SECONDS": 120,
    "alignvlm_jax.parallel.peers.LOST_SECONDS": 8,
    "alignvlm_jax.parallel.peers.BEAT_SECONDS": 0.5,
}


class Events:
    """The file of what this process does; a line is one write, so that a kill leaves whole
    lines."""

    def __init__(self, path: str):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.write(begun=os.getpid())

    def write(self, **fields: Any) -> None:
        os.write(self._file, f"{json.dumps({'time': time.time(), **fields})}\n".encode())


def main(arguments: list[str]) -> int:
    """Runs the command; returns its status."""
    events = Events(os.environ["STRESS_EVENTS"])
    time.sleep(float(os.environ.get("STRESS_DELAY", "0")))
    os.chdir(os.environ.get("STRESS_CWD", "."))
    if said := os.environ.get("STRESS_VERSION"):
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: said if name == "optax" else version(name)
    if ahead := float(os.environ.get("STRESS_CLOCK", "0")):
        now = time.time
        time.time = lambda: now() + ahead
    from alignvlm_jax import __main__ as program

    # Without any handler absl would make one for the terminal while all this is imported early.
    quiet = logging.NullHandler()
    logging.getLogger().addHandler(quiet)
    for name, value in (DURATIONS | json.loads(os.environ.get("STRESS_SETTINGS", "{}"))).items():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
        setattr(sys.modules[module], attribute, value)
    if of_slice := os.environ.get("STRESS_SLICE"):
        from tests.pod import slices

        slices.lay_out_as(of_slice)
    if os.environ.get("STRESS_QUIET") != "1":
        _tell_phases(events)
        _tell_batches(events)
    logging.getLogger().removeHandler(quiet)
    return program.main(arguments)


def _tell_phases(events: Events) -> None:
    from alignvlm_jax.train.goodput import Phases

    enter = Phases.enter

    @contextlib.contextmanager
    def told(self: Phases, phase: str):
        events.write(phase=phase)
        with enter(self, phase):
            yield
        events.write(phase=self.now)

    Phases.enter = told


def _tell_batches(events: Events) -> None:
    from alignvlm_jax.data import loader

    segments = loader.TrainSequences.segments
    init = loader.TrainBatches.__init__
    following = loader.TrainBatches.__next__

    slow = float(os.environ.get("STRESS_SLOW", "0"))

    def kept(self: loader.TrainSequences, index: int) -> list:
        found = segments(self, index)
        ids = self.__dict__.setdefault("ids", {})
        ids[index] = [name for name, _ in found]
        return found

    def begin(self: loader.TrainBatches, config, **kwargs) -> None:
        init(self, config, **kwargs)
        self.stage = config.stage

    def next_batch(self: loader.TrainBatches):
        time.sleep(slow)
        row = self.next_sequence
        batch = following(self)
        # Rows are read ahead by other threads, but never after the batch that they are in.
        ids = [self._sequences.ids.pop(row + local) for local in self._local_rows]
        digest = 0
        for name in sorted(batch):
            digest = zlib.crc32(batch[name].tobytes(), digest)
        events.write(stage=self.stage, row=row, rows=list(self._local_rows), ids=ids, digest=digest)
        return batch

    loader.TrainSequences.segments = kept
    loader.TrainBatches.__init__ = begin
    loader.TrainBatches.__next__ = next_batch


if __name__ == "__main__":
    from alignvlm_jax import __main__ as program

    try:
        status = main(sys.argv[1:])
    except Exception as err:
        import traceback

        traceback.print_exc()
        status = program._fail(f"unforeseen: {type(err).__name__}: {err}", status=70)
    program.leave_with(status)
