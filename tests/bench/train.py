"""Seconds of a training step on CPU: ours against the same model in torch and transformers, in
float32.

    make bench-train                            (in the venv of `make test-parity`)
    python -m tests.bench.train [CASE ...] [--busy]

Both start from the same weights and see the same batch again and again: SigLIP, ALIGN or MLP,
Llama; AdamW, gradients clipped, nothing rematerialised, no patch-token supervision. Losses of the
first LOSSES steps must agree. Each side is a process of its own, with two threads on the same two
cores; they take steps in turns, a few in a row, and one waits while the other computes. The first
of a turn is left out: in the meantime the memory of a step has gone back to the machine, and taking
it again costs up to half a step. Compiling and the first turn are left out, too.
"""

import importlib
import itertools
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
# Turns of each side that are timed, and the steps of each, by the name of the case in
# `training_ours.CASES`.
CASES = {"demonstration": (5, 10), "smollm2": (3, 3)}
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
        f"{NUM_THREADS} threads; medians over steps, and least to most over pairs of turns\n\n"
        "| model | connector | parameters | torch, s | ours, s | torch / ours | of CPU seconds "
        "| losses differ by |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for case in cases:
        for connector in CONNECTORS:
            print(row(case, connector, *CASES[case]), flush=True)


def row(case: str, connector: str, num_turns: int, num_steps: int) -> str:
    """Returns a row of the table.

    Raises:
      SystemExit: the losses differ, with those of both sides.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Ours first: it writes the weights and the batch that torch reads.
        ours, torch = (Side(name, case, connector, folder) for name in ("ours", "torch"))
        try:
            turns = [
                [[side.step() for _ in range(num_steps + 1)] for side in (torch, ours)]
                for _ in range(num_turns + 1)
            ]
        finally:
            ours.end()
            torch.end()
    by_side = [[turn[side] for turn in turns] for side in range(2)]
    losses = [[one.loss for one in itertools.chain(*of_one)][:LOSSES] for of_one in by_side]
    largest = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    if not largest <= TOLERANCE:
        raise SystemExit(
            f"{case}, {connector}: losses differ by {largest:.1e}, more than {TOLERANCE:.0e}: "
            f"torch {losses[0]}, ours {losses[1]}"
        )
    walls, cpus = (
        [[[getattr(one, what) for one in turn[1:]] for turn in of_one[1:]] for of_one in by_side]
        for what in ("wall", "cpu")
    )
    ratios = [sum(theirs) / sum(mine) for theirs, mine in zip(*walls, strict=True)]
    wall, cpu = (
        [statistics.median(itertools.chain(*of_one)) for of_one in seconds]
        for seconds in (walls, cpus)
    )
    return (
        f"| {case} | {connector} | {ours.num_params:,} | {wall[0]:.3f} | {wall[1]:.3f} | "
        f"**{wall[0] / wall[1]:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{cpu[0] / cpu[1]:.2f} | {largest:.0e} |"
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
