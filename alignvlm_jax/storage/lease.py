"""Who may write in a folder: one process at a time, on this machine by flock, in a bucket by a
lease.

A lease is an object that one process creates (only if there is none), writes anew every quarter of
`TTL_SECONDS` (only if it is still its own) and removes at the end. One that was not renewed for
`TTL_SECONDS` has expired: the process was killed. Both times are the server's: clocks of hosts may
differ.

flock holds over NFS too where the server locks (NFS 4); two hosts on a mounted bucket do not see
each other's lock, so there a workdir is better given as gs://.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import bucket, bucket_requests

TTL_SECONDS = 60.0
POLL_SECONDS = 2.0
MARGIN_SECONDS = 5.0
"""Nothing is begun to be written so shortly before the lease expires."""


_held: "set[_Lease]" = set()


def release_all() -> None:
    """Releases what this process holds in buckets: it is about to end without leaving what it has
    entered."""
    for one in list(_held):
        one.release()


@contextlib.contextmanager
def hold(
    lock: Path, what: str, say: Callable[[str], None], way_out: str = "wait for it"
) -> Iterator[None]:
    """Holds the folder of the file `lock` while entered; nobody else does.

    In a bucket, any change below the folder is refused from the moment that the lease was lost.

    Args:
      lock: the file.
      what: is done there, for messages: "is training in".
      say: told why this waits, where it does.
      way_out: what whoever is refused can do, for messages.

    Raises:
      UserError: another process holds it.
    """
    if bucket.is_bucket(lock):
        with _Lease(lock, what, say, way_out):
            yield
    else:
        with _flock(lock, what, way_out):
            yield


@contextlib.contextmanager
def _flock(lock: Path, what: str, way_out: str) -> Iterator[None]:
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            file.seek(0)
            raise UserError(
                f"{_holder(_fields(file.read()))} {what} {lock.parent}; {way_out}"
            ) from err
        file.truncate(0)
        file.write(json.dumps(_us()))
        file.flush()
        yield


class _Lease:
    def __init__(self, lock: Path, what: str, say: Callable[[str], None], way_out: str):
        self._lock = lock
        self._name = bucket.name_of(lock)
        self._what = what
        self._say = say
        self._way_out = way_out
        self._us = _us()
        self._content = json.dumps(self._us).encode()
        self._lost: str | None = None
        self._stop = threading.Event()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._take()
        folder = self._name.rpartition("/")[0]
        self._exit.enter_context(bucket_requests.guarded(f"{folder}/", self._check))
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        _held.add(self)

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives it back."""
        if self not in _held:
            return
        _held.discard(self)
        self._stop.set()
        self._thread.join()
        self._exit.close()
        if not self._lost:
            # Not worth an error: it expires.
            with contextlib.suppress(OSError), bucket_requests.as_guard(TTL_SECONDS / 12):
                bucket.remove(self._name, self._generation)

    def _take(self) -> None:
        """Creates the object, or takes over an expired one; waits at most until it would expire."""
        seen = None
        told = False
        while True:
            now = time.monotonic()
            found = bucket.stored(self._name)
            if found is None or found.age > TTL_SECONDS or self._is_dead():
                try:
                    self._generation = bucket.put(
                        self._name, self._content, found.generation if found else "0"
                    )
                    self._renewed = now
                    return
                except FileExistsError:
                    if self._is_ours():  # The answer was lost, and the request sent again.
                        self._renewed = now
                        return
                    continue
            holder = _holder(self._read())
            if seen is not None and seen != found.generation:
                raise UserError(
                    f"{holder} {self._what} {self._lock.parent}, and has renewed its lease just "
                    f"now (it expires {TTL_SECONDS:.0f} s after its last renewal); {self._way_out}"
                )
            if not told:
                self._say(
                    f"{holder} held {self._lock.parent} {found.age:.0f} s ago; waiting until its "
                    f"lease expires, at most {TTL_SECONDS - found.age:.0f} s"
                )
                told = True
            seen = found.generation
            time.sleep(POLL_SECONDS)

    def _read(self) -> dict[str, Any]:
        try:
            return _fields(self._lock.read_bytes())
        except FileNotFoundError:
            return {}

    def _is_ours(self) -> bool:
        found = bucket.stored(self._name)
        if found is None or self._read().get("token") != self._us["token"]:
            return False
        self._generation = found.generation
        return True

    def _is_dead(self) -> bool:
        """Whether the holder was a process of this very machine that is no more: no need to wait
        for its lease."""
        holder = self._read()
        if holder.get("machine") != self._us["machine"] or self._us["machine"] is None:
            return False
        return _started(holder.get("pid")) != holder.get("started")

    def _renew(self) -> None:
        while not self._stop.wait(TTL_SECONDS / 4):
            began = time.monotonic()
            try:
                # Short: a renewal counts from when it was sent at the earliest.
                with bucket_requests.as_guard(TTL_SECONDS / 12):
                    self._renew_at(began)
            except Exception:
                # Of the storage, or of its client. Tried again; meanwhile nothing is written once
                # it has expired.
                continue
            if self._lost:
                return

    def _renew_at(self, began: float) -> None:
        try:
            self._generation = bucket.put(self._name, self._content, self._generation)
        except FileExistsError:
            # Of a renewal that was sent again since its answer was lost, or of another process.
            if not self._is_ours():
                self._lost = f"{_holder(self._read())} has taken it"
                return
        self._renewed = began

    def _check(self) -> None:
        """Comes before every change below the folder."""
        if self._lost:
            raise UserError(
                f"the lease on {self._lock.parent} was lost: {self._lost}; nothing more is "
                "written there"
            )
        silent = time.monotonic() - self._renewed
        if silent > TTL_SECONDS - MARGIN_SECONDS:
            raise TimeoutError(
                f"the lease on {self._lock.parent} could not be renewed for {silent:.0f} s"
            )


def _us() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str | None:
    """Returns what tells process numbers of one boot and one container from others; None where
    nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        return None


def _started(pid: object) -> str | None:
    """Returns when a process of this machine began, in ticks since the boot; None where there is
    none."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _fields(content: str | bytes) -> dict[str, Any]:
    """Returns what a holder wrote of itself; nothing where that is damaged."""
    try:
        fields = json.loads(content)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _holder(fields: dict[str, Any]) -> str:
    try:
        return f"process {fields['pid']} on {fields['host']} (since {fields['since']})"
    except KeyError:
        return "another process"
