"""The rows of a predictions file as they come: kept as they are made, and shown."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.text import Text

from alignvlm_jax.eval import predictions
from alignvlm_jax.eval.predictions import Predictions
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.storage import lease

Rows = list[dict[str, Any]]


def collect(
    path: Path, header: dict[str, Any], make: Callable[[int], Iterable[Rows]], *, name: str, count: int, things: str
) -> Predictions:
    """Returns what is at `path`, if it was made in this very way; else makes the rows that are not there yet.

    Of several processes all call this; the main one reads and writes files, and tells the others.

    Args:
      path: of the predictions.
      header: says how they are made.
      make: of how many rows there are already, gives those that follow, some at a time.
      name: of all this, shown meanwhile.
      count: of the rows.
      things: what rows are of, in the plural.
    """
    if finished := _finished(path, header, count):
        return finished
    with _claimed(path, name):
        # Another process may have made it while this one waited.
        if finished := _finished(path, header, count):
            return finished
        writer = predictions.Writer(path, header, count) if distributed.is_main() else predictions.Collector(header)
        writer.predictions.rows[:] = exchange.from_main(writer.predictions.rows)
        done = len(writer.predictions.rows)
        with _progress_bar(things) as bar:
            shown = bar.add_task(name, total=count, completed=done)
            for made in make(done):
                writer.append(made)
                bar.advance(shown, len(made))
        return writer.publish()


def _finished(path: Path, header: dict[str, Any], count: int) -> Predictions | None:
    """What is at `path`, if it was made in this way and is whole."""
    found = predictions.read(path) if distributed.is_main() else None
    is_same = found is not None and predictions.is_same(found.header, header)
    if is_same and len(found.rows) != count:
        print(f"{path} has {len(found.rows):,} of {count:,} rows, and is made anew", file=sys.stderr)
        is_same = False
    rows = exchange.from_main(found.rows if is_same else None)
    return None if rows is None else Predictions(header, rows)


@contextlib.contextmanager
def _claimed(path: Path, name: str) -> Iterator[None]:
    """While entered, nobody else makes what is to be at `path`: two would write each other's file."""
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock")
            held.enter_context(lease.hold(lock, f"is at {name} in", lambda line: print(line, file=sys.stderr)))
        exchange.barrier()
        yield


class _Rate(progress.ProgressColumn):
    """Things a second, once there are any."""

    def __init__(self, things: str) -> None:
        super().__init__()
        self._things = things

    def render(self, task: progress.Task) -> Text:
        return Text(f"{task.speed:.1f} {self._things}/s" if task.speed else "")


def _progress_bar(things: str) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        _Rate(things),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not distributed.is_main(),
    )
