"""Records of the coming rows are on their way while those before are decoded."""

import threading
from collections.abc import Callable
from typing import Protocol

RECORDS = 128
"""On their way: twice as many as there are requests at a time."""
KEPT = 64 * RECORDS
"""Rows that were asked for: dicts keep their order, so that those read long ago are forgotten."""


class Rows(Protocol):
    """Rows whose records can be asked for before they are needed."""

    def prefetch(self, index: int) -> int:
        """Begins to read the records of a row; returns how many there are."""


class ReadAhead:
    """Asks for the records of rows once each, `RECORDS` before the row that is read. Several threads may read, each at
    another place."""

    def __init__(self, rows: Rows, num_rows: int, row: Callable[[int], int]):
        """`row` is the place among all rows of number `i` of the `num_rows` that are read."""
        self._rows, self._num_rows, self._row = rows, num_rows, row
        self._lock = threading.Lock()
        self._asked: dict[int, int] = {}

    def go_on(self, index: int) -> None:
        """Asks for what comes after number `index`, which is read now."""
        coming = 0
        while coming < RECORDS and index < self._num_rows:
            with self._lock:
                count = self._asked.setdefault(index, 0)
            if not count:
                count = self._rows.prefetch(self._row(index))
                with self._lock:
                    self._asked[index] = count
            coming += count
            index += 1
        with self._lock:
            while len(self._asked) > KEPT:
                del self._asked[next(iter(self._asked))]
