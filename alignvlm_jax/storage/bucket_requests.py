"""The requests to Cloud Storage, through gcsfs: how long one is tried again, who may forbid it, and
its error in one line, in bounded time."""

import asyncio
import contextlib
import contextvars
import errno
import functools
import itertools
import json
import logging
import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

START_PATIENCE = 8.0
"""Seconds in which a request that fails for a passing reason is begun again; with the last one's
time-out below 15."""
RUN_PATIENCE = 120.0
"""START_PATIENCE within a run, whose storage is known to work."""
CONNECT_SECONDS = 4
READ_SECONDS = 10
MAX_PAUSE = 8.0
"""Seconds between two tries at most."""
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"

_patience = START_PATIENCE
_own_patience: contextvars.ContextVar[float | None] = contextvars.ContextVar(
    "own_patience", default=None
)
_is_guard: contextvars.ContextVar[bool] = contextvars.ContextVar("is_guard", default=False)
_guards: dict[str, Callable[[], None]] = {}


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Has requests that fail for a passing reason be tried again for so long."""
    global _patience
    before = _patience
    _patience = seconds
    try:
        yield
    finally:
        _patience = before


@contextlib.contextmanager
def own_patience(seconds: float) -> Iterator[None]:
    """Gives requests of this thread alone a patience of their own; see `patience`."""
    token = _own_patience.set(seconds)
    try:
        yield
    finally:
        _own_patience.reset(token)


@contextlib.contextmanager
def as_guard(seconds: float) -> Iterator[None]:
    """Gives requests of this thread a patience of their own, and asks no guard about them."""
    token = _is_guard.set(True)
    try:
        with own_patience(seconds):
            yield
    finally:
        _is_guard.reset(token)


@contextlib.contextmanager
def guarded(prefix: str, check: Callable[[], None]) -> Iterator[None]:
    """Calls `check` before every change of an object whose "BUCKET/NAME" begins with `prefix`.

    It may raise a TimeoutError, to be asked again after a while, or a UserError.
    """
    _guards[prefix] = check
    try:
        yield
    finally:
        del _guards[prefix]


def check_guards(name: str) -> None:
    """Raises what the guards of an object or a folder raise."""
    if _is_guard.get():
        return
    for prefix, check in list(_guards.items()):
        if f"{name}/".startswith(prefix):
            check()


def __getattr__(name: str) -> type:
    """`Bucket`, the class that fsspec asks for by its name."""
    if name == "Bucket":
        return _bucket_class()
    raise AttributeError(name)


@functools.cache
def _bucket_class() -> type:
    import aiohttp
    import google.auth.exceptions
    import requests.exceptions
    from fsspec import asyn
    from gcsfs import core
    from gcsfs.retry import HttpError

    # It logs every request that fails with its traceback; the error says it in a line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    passing = (
        aiohttp.ClientError,
        TimeoutError,
        requests.exceptions.RequestException,
        ConnectionError,
    )
    refused = (google.auth.exceptions.GoogleAuthError,)

    class Bucket(core.GCSFileSystem):
        """The file system of buckets; not gcsfs's extended class, which asks another service for
        the kind of each bucket first."""

        protocol = "gs", "gcs"

        def __init__(self, *args: Any, **kwargs: Any):
            # Other processes write too: a listing is true only now.
            super().__init__(
                *args, **(kwargs | {"use_listings_cache": False, "token": _credentials()})
            )
            self.requests_timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS
            )

        async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            name = _object_of(path, args, kwargs)
            own = _own_patience.get()
            deadline = time.monotonic() + (_patience if own is None else own)
            pause = 0.2
            for attempt in itertools.count(1):
                try:
                    if method.upper() != "GET":
                        check_guards(name)
                    # Without the decorator of gcsfs, which tries again by rules of its own.
                    return await core.GCSFileSystem._request.__wrapped__(
                        self, method, path, *args, **kwargs
                    )
                except FileNotFoundError as err:
                    if method.upper() == "DELETE" and attempt > 1:
                        return 204, {}, None, b""  # The answer to an earlier attempt was lost.
                    raise _not_found(method, name, kwargs) from err
                except FileExistsError:
                    raise
                except (HttpError, *passing, *refused, OSError, ValueError) as err:
                    if (
                        not _is_passing(err, (*passing, *refused))
                        or time.monotonic() + pause > deadline
                    ):
                        raise _os_error(err, name) from err
                # At random, so that hosts which failed together do not all come back together.
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, MAX_PAUSE)

        async def _rm_files(self, paths: list[str]) -> Any:
            """Removes many objects in one request, which does not say which."""
            for path in paths:
                check_guards(self._strip_protocol(path))
            return await super()._rm_files(paths)

        # Of the base class they would answer no where they do not know.
        async def _isdir(self, path: str) -> bool:
            try:
                return (await self._info(path))["type"] == "directory"
            except FileNotFoundError:
                return False

        async def _isfile(self, path: str) -> bool:
            try:
                return (await self._info(path))["type"] == "file"
            except FileNotFoundError:
                return False

        async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
            """Does nothing: there are no folders, and no bucket is created by the way."""

        async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
            """Does nothing, as `_mkdir`."""

        mkdir = asyn.sync_wrapper(_mkdir)
        makedirs = asyn.sync_wrapper(_makedirs)

    return Bucket


def _credentials() -> Any:
    """Returns Google's default credentials, or "anon" where there are none, as for public buckets.

    Not gcsfs's search, which asks the machine's metadata server twice over: half a minute where
    there is none.
    """
    import google.auth
    import google.auth.exceptions

    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return "anon"
    # Which of the places that it looks at have none is no warning.
    logging.getLogger("google.auth").setLevel(logging.ERROR)
    try:
        return google.auth.default(scopes=[SCOPE])[0]
    except google.auth.exceptions.GoogleAuthError:
        return "anon"


def _is_passing(err: Exception, passing: tuple[type, ...]) -> bool:
    code = getattr(err, "code", None)
    if code is not None:
        return str(code) in ("408", "429") or str(code).startswith("5")
    return isinstance(err, passing)


def _object_of(path: str, args: tuple, kwargs: dict[str, Any]) -> str:
    """Returns the "BUCKET/NAME" that a request is about, as far as it says."""
    if args:
        return "/".join(str(part) for part in args[:2])
    parsed = urllib.parse.urlsplit(path)
    bucket = re.search(r"/b/([^/]+)", parsed.path) or re.match(r"b/([^/]+)", path)
    query = urllib.parse.parse_qs(parsed.query)
    data = kwargs.get("data")
    if "name" in query:
        key = query["name"][0]
    elif isinstance(data, bytes) and (
        found := re.search(rb'"name": ?("(?:[^"\\]|\\.)*")', data[:4096])
    ):
        key = json.loads(found.group(1))
    else:
        in_path = re.search(r"/o/([^/?]+)", parsed.path)
        key = urllib.parse.unquote(in_path.group(1)) if in_path else ""
    return f"{urllib.parse.unquote(bucket.group(1)) if bucket else ''}/{key}".rstrip("/")


def _not_found(method: str, name: str, kwargs: dict[str, Any]) -> FileNotFoundError:
    """Returns the error of a request that found nothing: a listing, and a write, find nothing only
    where the bucket is not there."""
    bucket, _, key = name.partition("/")
    if method.upper() == "POST" and "json" not in kwargs:
        return FileNotFoundError(errno.ENOENT, f"there is no bucket gs://{bucket}", f"gs://{name}")
    return FileNotFoundError(
        errno.ENOENT, "no such object" if key else "no such bucket", f"gs://{name}"
    )


def _os_error(err: Exception, name: str) -> OSError:
    text = " ".join(str(err).split())[:300] or type(err).__name__
    code = str(getattr(err, "code", ""))
    if text.startswith("Forbidden") or code in ("401", "403"):
        reason = text.split(" ", 2)[-1] if text.startswith("Forbidden") else text
        return PermissionError(errno.EACCES, f"no permission ({reason})", f"gs://{name}")
    if re.fullmatch(r"4\d\d", code) and code not in ("408", "429"):
        # A wrong name, a range beyond the end, a bucket whose requester pays: the same answer would
        # come again.
        return OSError(errno.EINVAL, f"Cloud Storage refuses ({text})", f"gs://{name}")
    return OSError(errno.EIO, f"Cloud Storage does not answer ({text})", f"gs://{name}")
