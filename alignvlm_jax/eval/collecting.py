"""The rows of a predictions file as they come: kept as they are made, and shown."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.text import Text

from alignvlm_jax.eval import predictions
from alignvlm_jax.eval.predictions import Predictions
from alignvlm_jax.parallel import distributed, exchange

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
    finished = predictions.read(path) if distributed.is_main() else None
    rows = finished.rows if finished is not None and finished.header == header else None
    if (rows := exchange.from_main(rows)) is not None:
        return Predictions(header, rows)
    writer = predictions.Writer(path, header) if distributed.is_main() else predictions.Collector(header)
    writer.predictions.rows[:] = exchange.from_main(writer.predictions.rows)
    done = len(writer.predictions.rows)
    with _progress_bar(things) as bar:
        shown = bar.add_task(name, total=count, completed=done)
        for made in make(done):
            writer.append(made)
            bar.advance(shown, len(made))
    return writer.publish()


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
