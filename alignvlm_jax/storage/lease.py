"""Locks on folders, so that one process at a time writes there: flock on this machine, a lease in a
bucket.

A lease is an object that a process creates (only if there is none), writes anew every quarter of
`TTL_SECONDS` (only if it is still its own) and removes at the end. A lease that was not renewed for
`TTL_SECONDS` has expired: its process was killed. The age of a lease is measured by the server's
clock alone, since clocks of hosts may differ.

flock holds over NFS, too, where the server locks (NFS 4). Two hosts on a mounted bucket do not see
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
"""No write begins this shortly before the lease expires."""


_held: "set[_Lease]" = set()


def release_all() -> None:
    """Releases the leases of this process, which is about to end without leaving the contexts that
    hold them."""
    for one in list(_held):
        one.release()


@contextlib.contextmanager
def hold(
    lock: Path, what: str, say: Callable[[str], None], way_out: str = "wait for it"
) -> Iterator[None]:
    """A context that holds the lock on the folder of the file `lock`.

    In a bucket, once the lease is lost, every change below the folder raises an error.

    Args:
      lock: the lock file or lease object.
      what: what this process does there, for messages, such as "is training in".
      say: called with a line for the user where this has to wait.
      way_out: what a process that is refused can do, for messages.

    Raises:
      UserError: another process holds the lock.
    """
    if bucket.is_bucket(lock):
        with _Lease(lock, what, say, way_out):
            yield
    else:
        with _flock(lock, what, way_out):
            yield


@contextlib.contextmanager
def _flock(lock: Path, what: str, way_out: str) -> Iterator[None]:
    # The kernel releases the lock with the file, also when the process is killed. "a+" and not "w":
    # opening it must not erase what the present holder wrote.
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
        file.flush()  # For the messages of processes that are refused.
        yield


class _Lease:
    """A lease on a folder in a bucket, renewed by a thread while it is entered."""

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
        """Removes the object, if it is still ours; does nothing the second time."""
        if self not in _held:
            return
        _held.discard(self)
        self._stop.set()
        self._thread.join()
        self._exit.close()
        if not self._lost:
            # A failure is not worth an error, since the lease expires. The generation keeps us from
            # removing another process's lease.
            with contextlib.suppress(OSError), bucket_requests.as_guard(TTL_SECONDS / 12):
                bucket.remove(self._name, self._generation)

    def _take(self) -> None:
        """Creates the object, or takes over an expired one; waits at most until it would expire."""
        seen = None
        told = False
        while True:
            # Before the request: counted from then, our lease expires no later than the server's.
            now = time.monotonic()
            found = bucket.stored(self._name)
            if found is None or found.age > TTL_SECONDS or self._is_dead():
                try:
                    # Only if the object is still the one just seen ("0": none). Of several
                    # processes that find it expired, one succeeds.
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
            # A new generation is a renewal: the holder lives, and waiting is of no use.
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
        """Returns what the holder wrote of itself; nothing where the object is gone."""
        try:
            return _fields(self._lock.read_bytes())
        except FileNotFoundError:
            return {}

    def _is_ours(self) -> bool:
        """Whether the object is this process's own, by its token; its generation is then noted."""
        found = bucket.stored(self._name)
        if found is None or self._read().get("token") != self._us["token"]:
            return False
        self._generation = found.generation
        return True

    def _is_dead(self) -> bool:
        """Whether the holder was a process of this machine that has ended: then its lease need not
        expire first."""
        holder = self._read()
        if holder.get("machine") != self._us["machine"] or self._us["machine"] is None:
            return False
        # Process numbers are used again; together with the time of the start they are unique.
        return _started(holder.get("pid")) != holder.get("started")

    def _renew(self) -> None:
        """Renews the lease every quarter of TTL_SECONDS, in the thread, until it is released or
        lost."""
        while not self._stop.wait(TTL_SECONDS / 4):
            began = time.monotonic()
            try:
                # With little patience: a renewal counts from before it was sent, so one that took
                # long would be worth less than a new one.
                with bucket_requests.as_guard(TTL_SECONDS / 12):
                    self._renew_at(began)
            except Exception:
                # Any error of the storage or its client: the next round tries again, and `_check`
                # keeps the process from writing once the lease has expired.
                continue
            if self._lost:
                return

    def _renew_at(self, began: float) -> None:
        try:
            self._generation = bucket.put(self._name, self._content, self._generation)
        except FileExistsError:
            # Either the answer to this renewal was lost and it was sent again, or another process
            # has taken the lease over.
            if not self._is_ours():
                self._lost = f"{_holder(self._read())} has taken it"
                return
        self._renewed = began

    def _check(self) -> None:
        """Raises an error where the folder must not be written: `bucket` calls it before every
        change below it.

        Raises:
          UserError: the lease was lost.
          TimeoutError: the lease could not be renewed; the caller tries again later.
        """
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
    """Returns what identifies this process as a holder; the token is new at each call."""
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str | None:
    """Returns an id of this boot and pid namespace, within which process numbers can be compared;
    None where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        return None


def _started(pid: object) -> str | None:
    """Returns when a process of this machine started, in clock ticks since the boot; None where
    there is no such process."""
    # Field 22 of /proc/PID/stat. Fields are counted from behind the command's name, which may have
    # spaces and brackets in it.
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _fields(content: str | bytes) -> dict[str, Any]:
    """Returns the fields that a holder wrote of itself; none where they are damaged."""
    try:
        fields = json.loads(content)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _holder(fields: dict[str, Any]) -> str:
    """Returns the holder's description for messages."""
    try:
        return f"process {fields['pid']} on {fields['host']} (since {fields['since']})"
    except KeyError:
        return "another process"
