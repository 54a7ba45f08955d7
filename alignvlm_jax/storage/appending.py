"""Files that grow, of which a kill takes at most the last seconds, and never half a piece."""

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import BinaryIO

from alignvlm_jax.storage import bucket
from alignvlm_jax.storage.bucket_requests import START_PATIENCE, own_patience

EVERY_SECONDS = 30.0
"""What was appended is on the disk, or in the bucket, by then."""

_open: "set[Appender]" = set()
"""Held here too: one that is dropped on the way of an error still has pieces to write."""


class Appender:
    """A file to append to, created where it is not there.

    Locally every piece is handed to the system at once, and synced to the disk every `every`
    seconds: also where the disk is a mounted bucket. Objects cannot grow, but the server can join
    two: pieces are kept for `every` seconds, put beside the object, and joined to it, so a run's
    metrics cost what they hold and not its square.
    """

    def __init__(self, where: Path, every: float = EVERY_SECONDS):
        self._sink = _Object(where) if bucket.is_bucket(where) else _File(where)
        self._every = every
        self._lock = threading.RLock()
        self._kept = bytearray()
        self._since: float | None = None
        self._error: BaseException | None = None
        self._wake = threading.Event()
        self._closed = False
        _open.add(self)
        threading.Thread(target=self._sync_often, daemon=True).start()

    def append(self, piece: bytes) -> None:
        """Adds a piece; OSError or UserError where this one, or one before, cannot be written."""
        with self._lock:
            self._raise()
            self._sink.write(self._kept, piece)
            if self._since is None:
                self._since = time.monotonic()

    def sync(self) -> None:
        """Returns when all pieces are safe from a kill, or of a disk from a loss of power."""
        with self._lock:
            self._raise()
            if self._since is not None:
                self._sink.sync(self._kept)
                self._since = None

    def close(self) -> None:
        """Syncs, and takes no more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.set()
            _open.discard(self)
            try:
                self.sync()
            finally:
                self._sink.close()

    def _sync_often(self) -> None:
        """Of a thread: an error is told at the next call from outside."""
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
            write = bucket.append if self._generation != "0" else bucket.put
            self._generation = write(self._name, bytes(kept), self._generation)
        except FileExistsError as err:
            # Of a request that was sent again since its answer was lost: it had been done.
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
    """Syncs all that are open; OSError or UserError where one cannot be written."""
    for appender in list(_open):
        appender.sync()


def close_all() -> None:
    """Closes all that are open, at the end of a program: what cannot be written soon is not written
    any more."""
    for appender in list(_open):
        with contextlib.suppress(Exception), own_patience(START_PATIENCE):
            appender.close()
