"""Files that grow, of which a kill takes at most the last seconds, and never half a piece."""

import contextlib
import os
import threading
import time
import weakref
from pathlib import Path
from typing import BinaryIO

from alignvlm_jax.storage import bucket

EVERY_SECONDS = 30.0
"""What was appended is on the disk, or in the bucket, by then."""

_open: "weakref.WeakSet[Appender]" = weakref.WeakSet()


class Appender:
    """A file to append to, created where it is not there.

    Locally every piece is handed to the system at once, and synced to the disk every `every` seconds: also where the
    disk is a mounted bucket. Objects cannot grow, but the server can join two: pieces are kept for `every` seconds, put
    beside the object, and joined to it, so a run's metrics cost what they hold and not its square.
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
        threading.Thread(target=_sync_often, args=(weakref.ref(self), self._wake, every), daemon=True).start()

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

    def _sync_if_due(self) -> None:
        """Of the thread: an error is told at the next call from outside."""
        with self._lock:
            if self._closed or self._error or self._since is None:
                return
            if time.monotonic() - self._since >= self._every / 2:
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
                raise OSError(err.errno, "another process writes it too", os.fspath(self._path)) from err
            self._generation = found.generation
        self._size += len(kept)
        kept.clear()

    def close(self) -> None:
        pass


def _sync_often(of: "weakref.ref[Appender]", wake: threading.Event, every: float) -> None:
    while not wake.wait(every / 2):
        appender = of()
        if appender is None:
            return
        appender._sync_if_due()
        del appender


def sync_all() -> None:
    """Syncs all that are open; OSError or UserError where one cannot be written."""
    for appender in list(_open):
        appender.sync()


def close_all() -> None:
    """Closes all that are open; what cannot be written any more was told before."""
    for appender in list(_open):
        with contextlib.suppress(Exception):
            appender.close()
