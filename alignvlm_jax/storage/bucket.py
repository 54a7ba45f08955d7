"""Cloud Storage in terms of files, through gcsfs: what is known of an object, and its changes.

`filesystem()` is what etils.epath, and orbax with it, use for gs:// paths too once `register` was
called. Importing gcsfs takes two thirds of a second, so both are late. How a request is made, and
made again: `bucket_requests`.
"""

import calendar
import contextlib
import dataclasses
import email.utils
import functools
import importlib.util
import json
import os
import random
import time
import urllib.parse
from typing import TYPE_CHECKING

from alignvlm_jax.errors import UserError, how_to_install
from alignvlm_jax.storage import bucket_requests

if TYPE_CHECKING:
    import gcsfs

SCHEME = "gs://"


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
    """Makes epath use this file system; costs nothing until it is used.

    Raises:
      UserError: gcsfs is not installed.
    """
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{SCHEME} paths need gcsfs: {how_to_install('gcs', 'setup')}")
    import fsspec

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, f"{bucket_requests.__name__}.Bucket", clobber=True)


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
    # "2026-11-29T01:17:26.123Z" is UTC: time.mktime would take it for local time.
    updated = calendar.timegm(time.strptime(fields["updated"][:19], "%Y-%m-%dT%H:%M:%S"))
    # The server's clock, as its answer has it: that of this machine may be wrong.
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
    # 64 random bits, which no content holds by chance.
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
    # The object must be of this generation both as a part and as what is replaced: if another
    # process has written meanwhile, nothing is composed.
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
        # A piece that is left behind does no harm: the next one is written over it.
        with contextlib.suppress(OSError):
            filesystem().rm_file(piece)


def remove(name: str, generation: str) -> None:
    """Removes an object if it is still the one of `generation`; FileExistsError if not."""
    bucket, _, key = name.partition("/")
    filesystem().call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)
