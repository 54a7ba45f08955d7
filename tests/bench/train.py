"""Seconds of a training step on CPU: ours against the same model in torch and transformers, in
float32.

    make bench-train                            (in the venv of `make test-parity`)
    python -m tests.bench.train [CASE ...] [--busy]

Both start from the same weights and see the same batch again and again: SigLIP, ALIGN or MLP,
Llama; AdamW, gradients clipped, nothing rematerialised, no patch-token supervision. Losses of the
first LOSSES steps must agree. Each side is a process of its own, with two threads on the same two
cores; they take their steps in turns, and one waits while the other computes. Compiling and the
first step are left out.
"""

import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from tests.bench import machine

CONNECTORS = ("align", "mlp")
# Steps of each side that are timed, by the name of the case in `training_ours.CASES`.
CASES = {"demonstration": 40, "smollm2": 5}
SIDES = {"torch": "tests.bench.training_torch", "ours": "tests.bench.training_ours"}
LOSSES = 5
TOLERANCE = 1e-4
"""Relative, of losses: both compute in float32, and sum in another order."""
NUM_THREADS = 2


class Step(NamedTuple):
    """A step that was taken: its loss before the update, seconds, and seconds of CPU."""

    loss: float
    wall: float
    cpu: float


def main(cases: list[str]) -> None:
    """Prints the table that docs/results.md shows."""
    print(
        f"{NUM_THREADS} threads; medians over steps, and least to most over pairs of steps\n\n"
        "| model | connector | parameters | torch, s | ours, s | torch / ours | of CPU seconds "
        "| losses differ by |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for case in cases:
        for connector in CONNECTORS:
            print(row(case, connector, CASES[case]), flush=True)


def row(case: str, connector: str, num_steps: int) -> str:
    """Returns a row of the table.

    Raises:
      SystemExit: the losses differ, with those of both sides.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Ours first: it writes the weights and the batch that torch reads.
        ours, torch = (Side(name, case, connector, folder) for name in ("ours", "torch"))
        try:
            steps = [(torch.step(), ours.step()) for _ in range(max(num_steps + 1, LOSSES))]
        finally:
            ours.end()
            torch.end()
    losses = [[one.loss for one in side] for side in zip(*steps[:LOSSES], strict=True)]
    largest = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    if not largest <= TOLERANCE:
        raise SystemExit(
            f"{case}, {connector}: losses differ by {largest:.1e}, more than {TOLERANCE:.0e}: "
            f"torch {losses[0]}, ours {losses[1]}"
        )
    theirs, mine = zip(*steps[1:], strict=True)
    walls, cpus = (
        [statistics.median(getattr(one, what) for one in side) for side in (theirs, mine)]
        for what in ("wall", "cpu")
    )
    pairs = [a.wall / b.wall for a, b in zip(theirs, mine, strict=True)]
    return (
        f"| {case} | {connector} | {ours.num_params:,} | {walls[0]:.3f} | {walls[1]:.3f} | "
        f"**{walls[0] / walls[1]:.2f}** ({min(pairs):.2f} to {max(pairs):.2f}) | "
        f"{cpus[0] / cpus[1]:.2f} | {largest:.0e} |"
    )


class Side:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, case: str, connector: str, folder: str):
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (SIDES[name], case, connector, folder, theirs)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.num_params = self._receive()

    def step(self) -> Step:
        """Takes the next step."""
        self._connection.send("step")
        return self._receive()

    def end(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join()

    def _receive(self):
        try:
            return self._connection.recv()
        except EOFError:
            raise SystemExit(f"{self._name} ended; what it said stands above") from None


def _serve(module: str, case: str, connector: str, folder: str, connection: Connection) -> None:
    # jax has no number of threads to set: it starts as many as there are cores to run on.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])
    num_params, step = importlib.import_module(module).start(case, connector, Path(folder))
    connection.send(num_params)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        began = time.perf_counter()
        used = time.process_time()
        loss = step()
        seconds = time.perf_counter() - began
        connection.send(Step(loss, seconds, time.process_time() - used))


if __name__ == "__main__":
    with machine.watched():
        main(sys.argv[1:] or list(CASES))
