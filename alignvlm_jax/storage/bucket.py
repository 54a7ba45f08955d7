"""Cloud Storage, through gcsfs: what it answers in terms of files, and an error in one line, in
bounded time.

`filesystem()` is what etils.epath, and orbax with it, use for gs:// paths too once `register` was
called. Importing gcsfs takes two thirds of a second, so both are late.
"""

import asyncio
import calendar
import contextlib
import contextvars
import dataclasses
import email.utils
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gcsfs

SCHEME = "gs://"
START_PATIENCE = 8.0
"""Seconds in which a request that fails for a passing reason is begun again; with the last one's
time-out below 15."""
RUN_PATIENCE = 120.0
"""The same within a run, whose storage is known to work."""
CONNECT_SECONDS = 4
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
READ_SECONDS = 10
MAX_PAUSE = 8.0

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
    """The same for requests of this thread alone."""
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


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object as it is now; `age` is the server's own time since it was written."""

    generation: str
    size: int
    age: float


def is_bucket(where: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(where).startswith(SCHEME)


def name_of(where: os.PathLike[str]) -> str:
    """Returns the "BUCKET/NAME" of a path."""
    return os.fspath(where).removeprefix(SCHEME)


def register() -> None:
    """Makes epath use this file system; costs nothing until it is used."""
    import fsspec

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, f"{__name__}.Bucket", clobber=True)


def __getattr__(name: str) -> type:
    """`Bucket`, the class that fsspec asks for by its name."""
    if name == "Bucket":
        return _bucket_class()
    raise AttributeError(name)


@functools.cache
def filesystem() -> "gcsfs.GCSFileSystem":
    """Returns the file system of all buckets."""
    import fsspec

    register()
    return fsspec.filesystem("gcs", finalize_on_close=True)


def stored(name: str) -> Stored | None:
    """Returns what is known of the object "BUCKET/NAME", or None where there is none."""
    bucket, _, key = name.partition("/")
    try:
        headers, content = filesystem().call("GET", "b/{}/o/{}", bucket, key)
    except FileNotFoundError:
        return None
    fields = json.loads(content)
    updated = calendar.timegm(time.strptime(fields["updated"][:19], "%Y-%m-%dT%H:%M:%S"))
    now = email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
    return Stored(fields["generation"], int(fields["size"]), now - updated)


def put(name: str, content: bytes, generation: str | None = None) -> str:
    """Writes an object whole, and returns its generation.

    Args:
      name: "BUCKET/NAME".
      content: all of it.
      generation: what must be there now; "0" is nothing.

    Raises:
      FileExistsError: something else is there.
      OSError: it cannot be written.
    """
    bucket, _, key = name.partition("/")
    boundary = f"=={random.getrandbits(64):x}=="
    head = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': key})}\r\n"
    head += f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
    files = filesystem()
    return files.call(
        "POST",
        f"{files._location}/upload/storage/v1/b/{urllib.parse.quote(bucket, safe='')}/o",
        uploadType="multipart",
        ifGenerationMatch=generation,
        headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
        data=head.encode() + content + f"\r\n--{boundary}--".encode(),
        json_out=True,
    )["generation"]


def append(name: str, content: bytes, generation: str) -> str:
    """Adds bytes to the end of an object on the server, at once; returns the new generation.

    Costs as much as the bytes added: they are put beside it, and both composed.

    Raises:
      FileExistsError: the object is no longer the one of `generation`.
      OSError: it cannot be written; nothing was added.
    """
    bucket, _, key = name.partition("/")
    piece = f"{name}.piece"
    put(piece, content)
    sources = [{"name": key, "generation": generation}, {"name": f"{key}.piece"}]
    try:
        return filesystem().call(
            "POST",
            "b/{}/o/{}/compose",
            bucket,
            key,
            ifGenerationMatch=generation,
            json={
                "kind": "storage#composeRequest",
                "sourceObjects": sources,
                "destination": {"name": key},
            },
            json_out=True,
        )["generation"]
    finally:
        with contextlib.suppress(OSError):
            filesystem().rm_file(piece)


def remove(name: str, generation: str) -> None:
    """Removes an object if it is still the one of `generation`; FileExistsError if not."""
    bucket, _, key = name.partition("/")
    filesystem().call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)


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
        """Not gcsfs's extended class, which asks another service for the kind of each bucket
        first."""

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
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, MAX_PAUSE)

        async def _rm_files(self, paths: list[str]) -> Any:
            """Many in one request, which does not say which."""
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
            """There are no folders, and no bucket is created by the way."""

        async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
            """The same."""

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
    """A listing, and a write, fail so only where the bucket is not there."""
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
