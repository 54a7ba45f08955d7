"""The file of predictions on one split: a header line that says how they were made, then a line a question.

It grows under a `.partial` name and is renamed when it is whole, so a file without that suffix is always complete.
"""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import statistics
from alignvlm_jax.eval.statistics import Statistics
from alignvlm_jax.storage import Path

DIRECTORY = "predictions"
TASKS = "tasks"
"""Folder within, of benchmarks."""
EVERY_SECONDS = 10.0
"""Answers reach a bucket by then."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One file. Every row has at least id, record and kind, and where something was asked question, answers and
    prediction; those of a split have score (ANLS) and exact, those of a task scores (by name, the sum and the weight of
    `Statistics`), known_as, and problem where the question could not be asked, or there was no text to read."""

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
        return statistics.total(row["scores"] for row in self.rows)

    def problems(self) -> list[str]:
        """Returns why questions of a task could not be asked, one a question."""
        return [row["problem"] for row in self.rows if "problem" in row]

    def margin(self, field: str) -> float:
        """Returns half the width of the 95 % interval of `mean`, taking questions as independent."""
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


def is_same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether predictions with these headers were made in the same way: where the checkpoint lay meanwhile does not
    count, which other fields know by its step and its time of training."""
    return {**first, "checkpoint": ""} == {**second, "checkpoint": ""}


def read_all(workdir: str | os.PathLike) -> dict[tuple[str, bool], Predictions]:
    """Returns the finished predictions of a workdir by split and whether the pages were blank."""
    found = _read_folder(storage.path(workdir) / DIRECTORY)
    return {(one.header["split"], one.header["blind"]): one for one in found if one is not None and one.rows}


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
        """`count` is how many rows the whole has, where that is known: a partial form with more begins anew."""
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read(self._partial)
        same = earlier is not None and is_same(earlier.header, header)
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
