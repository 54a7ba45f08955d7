"""What errors say, by the words of those that were seen."""

import errno
import json
import os
import socket
import ssl
import urllib.parse

import aiohttp
import jax
import pytest

from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.storage import bucket_requests, faults
from alignvlm_jax.storage.faults import Kind
from alignvlm_jax.train import checkpoint_files


def number(code: int) -> OSError:
    return OSError(code, os.strerror(code), "/x")


SEEN = [
    (number(errno.EIO), Kind.PASSING),
    (number(errno.ETIMEDOUT), Kind.PASSING),
    (number(errno.ESTALE), Kind.PASSING),
    (number(errno.ENOTCONN), Kind.PASSING),
    (number(errno.EACCES), Kind.REFUSED),
    (number(errno.EMFILE), Kind.MACHINE),
    (number(errno.ENAMETOOLONG), Kind.REFUSED),
    (
        OSError(
            "google::cloud::Status(UNAVAILABLE: Retry policy exhausted in ReadObjectNotWrapped)"
        ),
        Kind.PASSING,
    ),
    (number(errno.ENOENT), Kind.DAMAGE),
    (MemoryError(), Kind.MACHINE),
    (number(errno.ENXIO), Kind.REFUSED),
    (ssl.SSLError(1, "[SSL: APPLICATION_DATA_AFTER_CLOSE_NOTIFY]"), Kind.PASSING),
    (aiohttp.ClientOSError(1, "[SSL: APPLICATION_DATA_AFTER_CLOSE_NOTIFY]"), Kind.PASSING),
    (FileNotFoundError("gs://bucket/lr-timeout/checkpoints/7"), Kind.DAMAGE),
    (ValueError("bad magic in '/runs/lr-timeout/ABORTED/7'"), Kind.DAMAGE),
    (ValueError("bad magic in runs/lr-timeout/UNAVAILABLE"), Kind.DAMAGE),
    (ValueError('reading "gs://b/lr-timeout/x": HTTP/1.1 503'), Kind.PASSING),
    (TimeoutError("the lease"), Kind.PASSING),
    (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), Kind.PASSING),
    (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), Kind.PASSING),
    (ConnectionResetError("reset"), Kind.PASSING),
    (json.JSONDecodeError("Expecting value", "", 0), Kind.DAMAGE),
    (KeyError("next_sequence"), Kind.DAMAGE),
    (ValueError('UNAVAILABLE: Error reading "x": [HTTP response code: 503]'), Kind.PASSING),
    (ValueError("DEADLINE_EXCEEDED: CURL error 28: Timeout was reached"), Kind.PASSING),
    (ValueError("PERMISSION_DENIED: HTTP response code: 403"), Kind.REFUSED),
    (
        ValueError(
            'NOT_FOUND: Error opening "zarr" driver: Metadata at "gs://b/x/.zarray" does not exist'
        ),
        Kind.DAMAGE,
    ),
    (
        ValueError("DATA_LOSS: Error reading manifest: CRC-32C checksum verification failed"),
        Kind.DAMAGE,
    ),
    (
        ValueError('INTERNAL: Error reading "/x": [OS error 5: EIO Input/output error]'),
        Kind.PASSING,
    ),
    (
        ValueError('NOT_FOUND: Error opening "/x": [OS error 2: ENOENT No such file or directory]'),
        Kind.DAMAGE,
    ),
    (ValueError("FAILED_PRECONDITION: Error parsing object property"), Kind.DAMAGE),
]


@pytest.mark.parametrize(("err", "kind"), SEEN, ids=[str(err)[:40] for err, _ in SEEN])
def test_kinds(err, kind):
    assert faults.kind_of(err) is kind


@pytest.mark.parametrize(
    "name",
    ["/runs/a timed out x", "/runs/a HTTP 503 b", "gs://b/job UNAVAILABLE x", "/status code 403 x"],
)
def test_a_name_with_spaces_says_nothing_either(name):
    for text in (
        f"bad magic in {name}/checkpoints/7",
        f"bad magic in file://{urllib.parse.quote(name)}/7",
    ):
        assert faults.kind_of(ValueError(text), name) is Kind.DAMAGE
    assert faults.kind_of(ValueError(f"{name}/7: HTTP response code: 503"), name) is Kind.PASSING


@pytest.mark.parametrize(
    ("err", "raised"),
    [
        (TimeoutError("the storage does not answer"), TryAgainError),
        (OSError("Could not resolve host storage.googleapis.com: [CURL error 6]"), TryAgainError),
        (number(errno.ENOENT), UserError),
        (number(errno.ENOSPC), UserError),
        (number(errno.ENAMETOOLONG), UserError),
        (PermissionError(errno.EACCES, "Permission denied"), UserError),
    ],
)
def test_what_is_raised_says_whether_the_command_may_be_started_again(err, raised):
    failure = faults.as_error("cannot open x", err)
    assert type(failure) is raised and str(failure) == "cannot open x"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, Kind.REFUSED),
        (403, Kind.REFUSED),
        (408, Kind.PASSING),
        (416, Kind.REFUSED),
        (503, Kind.PASSING),
    ],
)
def test_answers_of_the_bucket(code, kind):
    """With what they were raised from."""
    inner = OSError(f"Error in gs://bucket/lr-timeout: {code}")
    inner.code = code
    err = bucket_requests._os_error(inner, "bucket/lr-timeout")
    err.__cause__ = inner
    assert faults.kind_of(err) is kind


@pytest.mark.parametrize("join", ["from", "context", "group"])
def test_what_came_first_is_the_reason(join):
    """Orbax wraps what it meets in errors of its own."""
    first = number(errno.EIO)
    outer = ValueError("cannot restore")
    if join == "group":
        outer = ExceptionGroup("several", [ValueError("x"), first])
    elif join == "from":
        outer.__cause__ = first
    else:
        outer.__context__ = first
    assert faults.kind_of(outer) is Kind.PASSING


@pytest.mark.parametrize(
    ("err", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("Error writing file [OS error 28: No space left on device]"), False),
        (
            ValueError(
                "UNKNOWN: Failed to write 3676515 bytes: File too large [os_error_code='27']"
            ),
            False,
        ),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (MemoryError(), False),
        (UserError("the lease on gs://bucket/run was lost"), False),
        (TryAgainError("the storage is silent"), True),
        (number(errno.ENOENT), False),
        (TimeoutError("the storage does not answer"), True),
        (ValueError("HTTP response code: 503"), True),
        (ValueError("nobody knows"), True),
        # A lost process closes its connections, in the midst of another's save.
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
            True,
        ),
        (
            jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service"),
            True,
        ),
    ],
)
def test_a_save_that_may_go_well_the_next_time(err, expected):
    assert checkpoint_files.may_pass(err) is expected
    wrapped = RuntimeError("the save failed")
    wrapped.__cause__ = err
    assert checkpoint_files.may_pass(wrapped) is expected
