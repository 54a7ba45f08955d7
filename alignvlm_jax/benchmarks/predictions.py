"""The file of predictions on one split: a header line that says how they were made, then a line a
question.

It grows under a `.partial` name and is renamed when it is whole, so a file without that suffix is
always complete.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import progress
from rich.console import Console
from rich.text import Text

from alignvlm_jax import storage
from alignvlm_jax.benchmarks.tasks import Task
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.storage import Path, lease


@dataclasses.dataclass(frozen=True)
class Statistics:
    """By score: a sum over questions, and the sum of their weights. Of two parts of a benchmark, as
    two hosts have them, the sum is that of the whole.

    A question usually adds its score and 1. F1 adds counts (`scores.fields`), VCR one for each
    covered text.
    """

    sums: Mapping[str, float]
    weights: Mapping[str, float]

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(_added(self.sums, other.sums), _added(self.weights, other.weights))

    def score(self, name: str) -> float | None:
        """Returns a score, None where no question counts."""
        return self.sums[name] / self.weights[name] if self.weights.get(name) else None


def total(parts: Iterable[Mapping[str, tuple[float, float]]]) -> Statistics:
    """Returns the statistics of questions, each given by its (sum, weight) of every score; none
    have an empty one."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for part in parts:
        for name, (value, weight) in part.items():
            sums[name] = sums.get(name, 0.0) + value
            weights[name] = weights.get(name, 0.0) + weight
    return Statistics(sums, weights)


def _added(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {name: ours.get(name, 0.0) + theirs.get(name, 0.0) for name in sorted({*ours, *theirs})}


DIRECTORY = "predictions"
TASKS = "tasks"
"""Folder within, of benchmarks."""
EVERY_SECONDS = 10.0
"""Answers reach a bucket by then."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One file. Every row has at least id, record and kind, and where something was asked question,
    answers and prediction; those of a split have score (ANLS) and exact, those of a task scores (by
    name, the sum and the weight of `Statistics`), known_as, and problem where the question could
    not be asked, or there was no text to read."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]

    def of_kind(self, kind: str) -> "Predictions":
        """Returns only the rows about documents of this kind."""
        return dataclasses.replace(self, rows=[row for row in self.rows if row["kind"] == kind])

    def kinds(self) -> list[str]:
        """Returns the kinds of documents that occur, sorted."""
        return sorted({row["kind"] for row in self.rows})

    def mean(self, field: str) -> float:
        """Returns the mean of a score over the rows."""
        return sum(row[field] for row in self.rows) / len(self.rows)

    def statistics(self) -> Statistics:
        """Returns what the scores of a task are made of."""
        return total(row["scores"] for row in self.rows)

    def problems(self) -> list[str]:
        """Returns why questions of a task could not be asked, one a question."""
        return [row["problem"] for row in self.rows if "problem" in row]

    def margin(self, field: str) -> float:
        """Returns half the width of the 95 % interval of `mean`, taking questions as
        independent."""
        mean = self.mean(field)
        variance = sum((row[field] - mean) ** 2 for row in self.rows) / len(self.rows)
        return 1.96 * math.sqrt(variance / len(self.rows))


def path_of(workdir: str | os.PathLike, split: str, blind: bool) -> Path:
    """Returns where a split's predictions stand in a workdir."""
    return storage.path(workdir) / DIRECTORY / f"{split}{'_blind' if blind else ''}.jsonl"


def task_path(workdir: str | os.PathLike, task: str) -> Path:
    """Returns where a task's predictions stand in a workdir."""
    return storage.path(workdir) / DIRECTORY / TASKS / f"{task}.jsonl"


def read(path: Path) -> Predictions | None:
    """Returns the predictions in a file, or None where there is no header to read.

    What follows the last newline is left out: a line half written when its process was stopped.

    Raises:
      UserError: a whole line is not JSON.
    """
    if not path.exists():
        return None
    lines = path.read_bytes().decode().split("\n")[:-1]
    try:
        values = [json.loads(line) for line in lines]
    except ValueError as err:
        raise UserError(f"{path} is damaged ({err}); delete it and evaluate again") from err
    return Predictions(values[0], values[1:]) if values else None


def made_alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether predictions with these headers were made in the same way: where the checkpoint lay
    meanwhile does not count, which other fields know by its step and its time of training."""
    return {**first, "checkpoint": ""} == {**second, "checkpoint": ""}


def read_all(workdir: str | os.PathLike) -> dict[tuple[str, bool], Predictions]:
    """Returns the finished predictions of a workdir by split and whether the pages were blank."""
    found = _read_folder(storage.path(workdir) / DIRECTORY)
    return {
        (one.header["split"], one.header["blind"]): one
        for one in found
        if one is not None and one.rows
    }


def read_tasks(workdir: str | os.PathLike) -> dict[str, Predictions]:
    """Returns the finished predictions of a workdir by task."""
    found = _read_folder(storage.path(workdir) / DIRECTORY / TASKS)
    return {one.header["task"]: one for one in found if one is not None and one.rows}


def _read_folder(folder: Path) -> list[Predictions | None]:
    return [read(path) for path in sorted(storage.children(folder)) if path.suffix == ".jsonl"]


class Writer:
    """Appends to a file's partial form, from where an earlier process with the same header stopped.

    Attributes:
      predictions: what is in the file so far.
    """

    def __init__(self, path: Path, header: dict[str, Any], count: int | None = None) -> None:
        """`count` is how many rows the whole has, where that is known: a partial form with more
        begins anew."""
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read(self._partial)
        same = earlier is not None and made_alike(earlier.header, header)
        if same and count is not None and len(earlier.rows) > count:
            same = False
        self.predictions = Predictions(header, list(earlier.rows) if same else [])
        if same:
            whole = self._partial.read_bytes()
            storage.write_whole(self._partial, whole[: whole.rindex(b"\n") + 1])
        else:
            storage.write_whole(self._partial, _lines([header]))
        self._file = storage.Appender(self._partial, every=EVERY_SECONDS)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows; a stop between calls loses none, in a bucket those of the last seconds."""
        self.predictions.rows.extend(rows)
        self._file.append(_lines(rows).encode())

    def publish(self) -> Predictions:
        """Gives the whole file its name."""
        self._file.close()
        storage.move(self._partial, self._path)
        return self.predictions


class Collector:
    """Stands in for a `Writer` on processes that write nothing.

    Attributes:
      predictions: what was appended.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.predictions = Predictions(header, [])

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows."""
        self.predictions.rows.extend(rows)

    def publish(self) -> Predictions:
        """Returns what was appended."""
        return self.predictions


def _lines(values: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


Rows = list[dict[str, Any]]


def collect(
    path: Path,
    header: dict[str, Any],
    make: Callable[[int], Iterable[Rows]],
    *,
    name: str,
    count: int,
    things: str,
) -> Predictions:
    """Returns what is at `path`, if it was made in this very way; else makes the rows that are not
    there yet.

    Of several processes all call this; the main one reads and writes files, and tells the others.

    Args:
      path: of the predictions.
      header: says how they are made.
      make: of how many rows there are already, gives those that follow, some at a time.
      name: of all this, shown meanwhile.
      count: of the rows.
      things: what rows are of, in the plural.
    """
    if finished := _finished(path, header, count, is_locked=False):
        return finished
    with _locked(path, name):
        # Another process may have made it while this one waited.
        if finished := _finished(path, header, count, is_locked=True):
            return finished
        writer = Writer(path, header, count) if distributed.is_main() else Collector(header)
        writer.predictions.rows[:] = exchange.from_main(writer.predictions.rows)
        done = len(writer.predictions.rows)
        with _progress_bar(things) as bar:
            shown = bar.add_task(name, total=count, completed=done)
            for made in make(done):
                writer.append(made)
                bar.advance(shown, len(made))
        return writer.publish()


def _finished(
    path: Path, header: dict[str, Any], count: int, *, is_locked: bool
) -> Predictions | None:
    """What is at `path`, if it was made in this way and is whole; where it is not, and is about to
    be made, says so."""
    found = read(path) if distributed.is_main() else None
    is_same = found is not None and made_alike(found.header, header)
    is_whole = is_same and len(found.rows) == count
    if is_same and not is_whole and is_locked:
        print(
            f"{path} has {len(found.rows):,} of {count:,} rows, and is made anew", file=sys.stderr
        )
    rows = exchange.from_main(found.rows if is_whole else None)
    return None if rows is None else Predictions(header, rows)


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """While entered, nobody else makes what is to be at `path`: two would write each other's
    file."""
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock")
            held.enter_context(
                lease.hold(lock, f"is at {name} in", lambda line: print(line, file=sys.stderr))
            )
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


def write_submission(path: Path, result: Predictions, task: Task) -> None:
    """Writes a JSON array of ids and answers, as the server of a benchmark takes it; ids that are
    numbers as such."""
    id_name, answer_name = task.submission
    entries = [
        {
            id_name: int(row["known_as"]) if row["known_as"].isdecimal() else row["known_as"],
            answer_name: task.answer(row["prediction"]),
        }
        for row in result.rows
    ]
    storage.write_whole(path, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
