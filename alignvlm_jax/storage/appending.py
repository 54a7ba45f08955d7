"""Files that grow by pieces; a kill loses at most the last seconds, and never half a piece."""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import BinaryIO

from alignvlm_jax.storage import bucket
from alignvlm_jax.storage.bucket_requests import START_PATIENCE, own_patience

EVERY_SECONDS = 30.0
"""Seconds within which an appended piece is on the disk or in the bucket."""

_open: "set[Appender]" = set()
"""All open appenders. An error may drop the last other reference to one that still has pieces to
write."""


class Appender:
    """A file to append to, created where it does not exist.

    On this machine every piece is handed to the system at once, and synced to the disk every
    `every` seconds, also where the disk is a mounted bucket. In a bucket objects cannot grow, but
    the server can compose two: pieces are kept for `every` seconds, put beside the object, and
    composed with it. Writing the object anew would cost the square of its size over a run.

    Args:
      where: path of the file.
      every: seconds within which a piece is written out.
    """

    def __init__(self, where: Path, every: float = EVERY_SECONDS):
        self._sink = _Object(where) if bucket.is_bucket(where) else _File(where)
        self._every = every
        self._lock = threading.RLock()  # Re-entrant, since `close` syncs while it holds it.
        self._kept = bytearray()
        self._since: float | None = None  # When the oldest piece came that is not synced.
        self._error: BaseException | None = None
        self._wake = threading.Event()
        self._closed = False
        _open.add(self)
        threading.Thread(target=self._sync_often, daemon=True).start()

    def append(self, piece: bytes) -> None:
        """Adds a piece; OSError or UserError where it, or an earlier piece, cannot be written."""
        with self._lock:
            self._raise()
            self._sink.write(self._kept, piece)
            if self._since is None:
                self._since = time.monotonic()

    def sync(self) -> None:
        """Writes out all pieces; then they are safe from a kill, and on a disk from a loss of
        power."""
        with self._lock:
            self._raise()
            if self._since is not None:
                self._sink.sync(self._kept)
                self._since = None

    def close(self) -> None:
        """Syncs, and closes the file; closing it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.set()  # The thread does not sleep on until its next round.
            _open.discard(self)
            try:
                self.sync()
            finally:
                self._sink.close()

    def _sync_often(self) -> None:
        """Syncs in a thread of its own; an error is kept, and raised by the next call of another
        method."""
        # By half of `every`: a piece that is just too new for one round is synced in the next, and
        # none waits for longer than `every`.
        while not self._wake.wait(self._every / 2):
            with self._lock:
                if self._closed or self._error:
                    return
                if self._since is not None and time.monotonic() - self._since >= self._every / 2:
                    try:
                        self.sync()
                    except BaseException as err:
                        self._error = err

    def _raise(self) -> None:
        if self._error:
            raise self._error


class _File:
    """A file on this machine."""

    def __init__(self, where: Path):
        self._file: BinaryIO = where.open("ab")

    def write(self, kept: bytearray, piece: bytes) -> None:
        self._file.write(piece)
        self._file.flush()

    def sync(self, kept: bytearray) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Object:
    """An object in a bucket; generation "0" stands for an object that does not exist yet."""

    def __init__(self, where: Path):
        self._path = where
        self._name = bucket.name_of(where)
        found = bucket.stored(self._name)
        self._generation, self._size = (found.generation, found.size) if found else ("0", 0)

    def write(self, kept: bytearray, piece: bytes) -> None:
        kept += piece

    def sync(self, kept: bytearray) -> None:
        if not kept:
            return
        try:
            # Only if the object is still of our generation: another writer's pieces are not lost.
            write = bucket.append if self._generation != "0" else bucket.put
            self._generation = write(self._name, bytes(kept), self._generation)
        except FileExistsError as err:
            # The answer to a request may be lost, and the request sent again: then the first one
            # was done, and the object has exactly the size that we expect.
            found = bucket.stored(self._name)
            if found is None or found.size != self._size + len(kept):
                raise OSError(
                    err.errno, "another process writes it too", os.fspath(self._path)
                ) from err
            self._generation = found.generation
        self._size += len(kept)
        kept.clear()

    def close(self) -> None:
        pass


def sync_all() -> None:
    """Syncs all open appenders; OSError or UserError where one cannot be written."""
    for appender in list(_open):
        appender.sync()


def close_all() -> None:
    """Closes all open appenders at the end of a program; pieces that cannot be written soon are
    given up."""
    # A copy, since `close` removes from the set.
    for appender in list(_open):
        with contextlib.suppress(Exception), own_patience(START_PATIENCE):
            appender.close()
