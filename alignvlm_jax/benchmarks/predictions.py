"""Files of predictions: a header line that says how they were made, then a line for each question.

A file grows under a `.partial` name and is renamed when it is complete: a file without that suffix
is always complete.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich import progress
from rich.console import Console

from alignvlm_jax import storage
from alignvlm_jax.benchmarks import scores
from alignvlm_jax.benchmarks.scores.sums import Statistics, total
from alignvlm_jax.benchmarks.tasks import Task
from alignvlm_jax.data.tasks import TRANSCRIBE_QUESTION
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.storage import Path, lease
from alignvlm_jax.train.goodput import duration

DIRECTORY = "predictions"
TASKS = "tasks"
"""Name of the folder of the benchmarks' predictions, within `DIRECTORY`."""
EVERY_SECONDS = 10.0
"""Longest time after which predictions are uploaded to a bucket."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The content of a file of predictions.

    Every row has `id`, `record` and `kind`; rows of questions have `question`, `answers` and
    `prediction`, and `is_cut` of answers that had not come to their end (files of before have no
    such field). Rows of a split have `score` (ANLS) and `exact`. Rows of a task have `scores` (by
    name, the sum and the weight of `Statistics`), `known_as` if they are of a question, and
    `problem` if the question could not be asked, or there was no text to read.

    Attributes:
      header: says how the predictions were made.
      rows: one for each question or text, in order.
    """

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

    def character_error_rate(self) -> float | None:
        """Returns the character error rate over all transcriptions of pages, each of which weighs
        as much as it is long; None if nothing was to be transcribed."""
        pairs = [
            scores.character_errors(row["prediction"], row["answers"])
            for row in self.rows
            if row.get("question") == TRANSCRIBE_QUESTION and row["answers"]
        ]
        length = sum(length for _, length in pairs)
        return sum(edits for edits, _ in pairs) / length if length else None

    def num_cut(self) -> int | None:
        """Returns how many answers had not come to their end; None if that was not written down."""
        known = [row["is_cut"] for row in self.rows if "is_cut" in row]
        return sum(known) if known else None

    def statistics(self) -> Statistics:
        """Returns the sums and weights of the scores of a task."""
        return total(row["scores"] for row in self.rows)

    def problems(self) -> list[str]:
        """Returns the reasons why questions of a task could not be asked, one for each of them."""
        return [row["problem"] for row in self.rows if "problem" in row]

    def margin(self, field: str) -> float:
        """Returns half the width of the 95 % confidence interval of `mean(field)`.

        It is the normal approximation for independent questions.
        """
        mean = self.mean(field)
        variance = sum((row[field] - mean) ** 2 for row in self.rows) / len(self.rows)
        # 95 % of a normal distribution lie within 1.96 standard deviations of its mean.
        return 1.96 * math.sqrt(variance / len(self.rows))


def path_of(workdir: str | os.PathLike, split: str, blind: bool) -> Path:
    """Returns the path of a split's predictions in a workdir; `blind` if pages are blank."""
    return storage.path(workdir) / DIRECTORY / f"{split}{'_blind' if blind else ''}.jsonl"


def task_path(workdir: str | os.PathLike, task: str) -> Path:
    """Returns the path of a task's predictions in a workdir."""
    return storage.path(workdir) / DIRECTORY / TASKS / f"{task}.jsonl"


def read(path: Path) -> Predictions | None:
    """Returns the predictions in a file, or None if it does not exist or has no header yet.

    Raises:
      UserError: a complete line is not JSON.
    """
    if not path.exists():
        return None
    # What follows the last newline is a line that was half written when its process stopped.
    lines = path.read_bytes().decode().split("\n")[:-1]
    try:
        # Not splitlines: texts are written as they are, and one with U+2028 would be cut in two.
        values = [json.loads(line) for line in lines]
    except ValueError as err:
        raise UserError(f"{path} is damaged ({err}); delete it and evaluate again") from err
    return Predictions(values[0], values[1:]) if values else None


def made_alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether predictions with these headers were made in the same way.

    The paths of the checkpoint and of the data do not count, since both may be moved: other fields
    identify the checkpoint by its step and its time of training, the data by a fingerprint. Nor do
    the run's name and id, which headers of earlier versions lack.
    """
    names = dict.fromkeys(("checkpoint", "folder", "run", "run_id"))
    return {**first, **names} == {**second, **names}


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
    """Returns the predictions in the complete files of a folder (partial ones end otherwise)."""
    return [read(path) for path in sorted(storage.children(folder)) if path.suffix == ".jsonl"]


class Writer:
    """A writer that appends to the partial file of some predictions.

    It resumes where an earlier process with the same header stopped.

    Attributes:
      predictions: the content of the file so far.
    """

    def __init__(self, path: Path, header: dict[str, Any], count: int | None = None) -> None:
        """Opens the partial file.

        Args:
          path: the path of the complete file.
          header: says how the predictions are made.
          count: the number of rows of the complete file, if known; a partial file with more rows
            is begun anew.
        """
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read(self._partial)
        same = earlier is not None and made_alike(earlier.header, header)
        # More rows than there are questions: the file is of other ones, whatever its header says.
        if same and count is not None and len(earlier.rows) > count:
            same = False
        self.predictions = Predictions(header, list(earlier.rows) if same else [])
        if same:
            # Without the half of a line that `read` ignored: the next row would be glued to it.
            whole = self._partial.read_bytes()
            storage.write_whole(self._partial, whole[: whole.rindex(b"\n") + 1])
        else:
            storage.write_whole(self._partial, _lines([header]))
        self._file = storage.Appender(self._partial, every=EVERY_SECONDS)

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows to the file.

        If the process stops between calls, no row is lost; in a bucket those of the last
        `EVERY_SECONDS` are.
        """
        self.predictions.rows.extend(rows)
        self._file.append(_lines(rows).encode())

    def publish(self) -> Predictions:
        """Renames the file, which is complete now; returns its content."""
        # Before the rename: closing writes out what the appender still keeps.
        self._file.close()
        storage.move(self._partial, self._path)
        return self.predictions


class Collector:
    """A substitute for `Writer` on processes that write no files.

    Attributes:
      predictions: the header and all appended rows.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.predictions = Predictions(header, [])

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows to `predictions`."""
        self.predictions.rows.extend(rows)

    def publish(self) -> Predictions:
        """Returns the header and all appended rows."""
        return self.predictions


def _lines(values: Sequence[dict[str, Any]]) -> str:
    """Returns values as JSON lines."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


Rows = list[dict[str, Any]]
TOLD_SECONDS = 30
"""How often a log is told how far it is, at most."""
PAUSE = 0.02
"""Seconds between rows of two batches, at least."""


def collect(
    path: Path,
    header: dict[str, Any],
    make: Callable[[int], Iterable[Rows]],
    *,
    name: str,
    count: int,
    things: str,
) -> Predictions:
    """Returns the predictions at `path`; makes those that are missing or were made differently.

    All processes call this together. The main one alone reads and writes files, and sends what it
    reads to the others.

    Args:
      path: the path of the file of predictions.
      header: says how the predictions are made.
      make: called with the number of rows that there are, yields the following ones in lists.
      name: the label of the progress bar.
      count: the number of rows of the complete file.
      things: what a row is about, in the plural, for the progress bar.
    """
    # Without the lock first: complete predictions can be read while another job is at work.
    if finished := _finished(path, header, count, is_locked=False):
        return finished
    with _locked(path, name):
        # Another process may have made it while this one waited.
        if finished := _finished(path, header, count, is_locked=True):
            return finished
        writer = Writer(path, header, count) if distributed.is_main() else Collector(header)
        # All processes have to resume at the same row: generation is a collective computation.
        writer.predictions.rows[:] = exchange.from_main(writer.predictions.rows)
        done = len(writer.predictions.rows)
        with _progress_bar() as bar:
            shown = bar.add_task(name, total=count, completed=done, pace="")
            is_log = not (bar.disable or bar.console.is_terminal)
            if is_log:
                bar.console.print(f"{name}: {count - done:,} of {count:,} {things} to go")
            started = told = last = time.monotonic()
            line = ""
            for made in make(done):
                now = time.monotonic()
                # Of what there was before a pause: of a batch's rows the first alone tells nothing.
                if line and now - told > TOLD_SECONDS and now - last > PAUSE:
                    told = now
                    bar.console.print(line)
                last = now
                writer.append(made)
                number = len(writer.predictions.rows)
                # Where texts are longer than a batch, some bring no row.
                if number > done:
                    pace = _pace(number - done, now - started, count - number, things)
                    bar.update(shown, completed=number, pace=pace)
                    line = f"{name}: {number:,} of {count:,}, {pace}" if is_log else ""
        return writer.publish()


def _finished(
    path: Path, header: dict[str, Any], count: int, *, is_locked: bool
) -> Predictions | None:
    """Returns the predictions at `path` if they were made in this way and are complete, else None.

    With the lock held, a file that has another number of rows is about to be replaced: a line on
    stderr says so.
    """
    # On a shared disk the others might see another state: the main process decides for all.
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
    """A context in which no other job makes the file at `path`.

    Two evaluations of a workdir at once would write into one partial file.
    """
    with contextlib.ExitStack() as held:
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock")
            # A lease, not a plain lock file: one that a killed process leaves behind expires.
            held.enter_context(
                lease.hold(lock, f"is at {name} in", lambda line: print(line, file=sys.stderr))
            )
        # The other processes wait until the main one holds the lock.
        exchange.barrier()
        yield


def _pace(number: int, seconds: float, left: int, things: str) -> str:
    """Returns the things done a second, and the time left. Both since the start: rich's own rate is
    that between rows, of which those of a batch come at once."""
    rate = number / max(seconds, 1e-9)
    shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"{shown} {things}/s, {duration(left / rate)} left"


def _progress_bar() -> progress.Progress:
    """Returns a progress bar on stderr, which only the main process shows."""
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[pace]}"),
        console=Console(stderr=True),
        disable=not distributed.is_main(),
    )


def write_submission(path: Path, result: Predictions, task: Task) -> None:
    """Writes predictions as a JSON array of ids, those of digits alone as numbers, and answers, for
    the server of a benchmark."""
    id_name, answer_name = task.submission
    entries = [
        {
            id_name: int(row["known_as"]) if row["known_as"].isdecimal() else row["known_as"],
            answer_name: task.answer(row["prediction"]),
        }
        for row in result.rows
    ]
    storage.write_whole(path, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
