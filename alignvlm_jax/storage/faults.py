"""The classification of errors of reading and writing: damaged files, the storage, or this machine.

The kind decides whether a command may be started again, and what happens to a checkpoint. Only
damage that its files show puts a checkpoint in quarantine: a storage that does not answer, or
refuses, says nothing about the files, and must not cost a run its newest state.
"""

import enum
import errno
import re
import socket
import urllib.parse
from collections.abc import Iterator

from alignvlm_jax.errors import TryAgainError, UserError


class Kind(enum.Enum):
    """The kind of an error."""

    PASSING = "passing"
    """The storage fails now, and may work at the next try."""
    REFUSED = "refused"
    """The storage refuses, and trying again does not help: no permission, or no such operation."""
    MACHINE = "machine"
    """This machine fails: no memory, no disk space, no file descriptors."""
    DAMAGE = "damage"
    """The files are missing or damaged."""


_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ}
_MACHINE = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EPIPE,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTUNREACH, errno.ESHUTDOWN,
}  # fmt: skip
# All other numbers mean that the request is refused, such as EACCES, EROFS, ENAMETOOLONG, EINVAL.

# Patterns of tensorstore's messages, whose exceptions are ValueErrors whatever happened. A status
# name stands at the beginning of a message, and again where it is passed on; numbers are those of
# the system's errors and of HTTP.
_PATH = re.compile(
    r"(?<![\w.])(?!HTTP/|input/output)(?:\w+:/)?[\w.=-]*(?:/[^\s/'\"\],;:]*)+", re.IGNORECASE
)
"""Paths in a message, which are removed before it is searched: gs://bucket/lr-timeout/7 is no
time-out."""
_SYSTEM = re.compile(r"OS error (\d+)|os_error_code='(\d+)'")
_HTTP = re.compile(r"(?:HTTP response code:?|status code|HTTP/[\d.]+|HTTP) (\d{3})\b")
_STATUSES = (
    ("PERMISSION_DENIED", Kind.REFUSED),
    ("UNAUTHENTICATED", Kind.REFUSED),
    ("RESOURCE_EXHAUSTED", Kind.PASSING),
    ("UNAVAILABLE", Kind.PASSING),
    ("DEADLINE_EXCEEDED", Kind.PASSING),
    ("ABORTED", Kind.PASSING),
    ("CANCELLED", Kind.PASSING),
)
_PASSING_WORDS = re.compile(
    r"timed? ?out|connection (?:reset|refused|closed|aborted)|could ?n.t (?:resolve|connect)|"
    r"temporarily unavailable|input/output error|stale file handle|transport endpoint|CURL error|"
    r"does not answer|broken pipe",
    re.IGNORECASE,
)


def kind_of(err: BaseException, about: str = "") -> Kind:
    """Returns the kind of an error: that of the earliest error in its chain whose kind is not
    DAMAGE, or DAMAGE where all are.

    Args:
      err: the error, with those that it was raised from.
      about: the path that messages may name, "" where it is not known. With spaces in it, a pattern
        cannot tell where it ends.
    """
    # What came first is the cause. DAMAGE is also the kind of an error that says nothing, so that
    # any other kind in the chain goes before it.
    kinds = [_kind_of_one(one, about) for one in chain(err)]
    return next((kind for kind in reversed(kinds) if kind is not Kind.DAMAGE), Kind.DAMAGE)


def as_error(message: str, err: BaseException) -> UserError:
    """Returns the exception to raise, with this message, for an error of the storage: TryAgainError
    where it may pass, UserError where not."""
    return (TryAgainError if kind_of(err) is Kind.PASSING else UserError)(message)


def chain(err: BaseException) -> Iterator[BaseException]:
    """Yields an error and all errors that it was raised from or that it groups, the latest
    first."""
    # Errors may refer to each other in a circle.
    seen: set[int] = set()
    waiting = [err]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [*getattr(one, "exceptions", ()), one.__cause__ or one.__context__]


def _kind_of_one(err: BaseException, about: str) -> Kind:
    if isinstance(err, MemoryError):
        return Kind.MACHINE
    # Before errno is read: TLS and name resolution number their errors in their own ways, 1 (EPERM)
    # among them.
    is_of_network = isinstance(err, TimeoutError | ConnectionError | socket.gaierror)
    if is_of_network or type(err).__module__.split(".")[0] in ("ssl", "aiohttp"):
        return Kind.PASSING
    if isinstance(err, OSError) and err.errno is not None:
        return _kind_of_number(err.errno)
    if isinstance(err, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Kind.DAMAGE
    if isinstance(err, PermissionError | FileExistsError):
        return Kind.REFUSED
    text = str(err)
    for name in {about, urllib.parse.quote(about)} - {""}:
        text = text.replace(name, " ")
    text = _PATH.sub(" ", text)
    if found := _SYSTEM.search(text):
        return _kind_of_number(int(found.group(1) or found.group(2)))
    if found := _HTTP.search(text):
        status = int(found.group(1))
        if status in (401, 403):
            return Kind.REFUSED
        if status in (408, 429) or status >= 500:
            return Kind.PASSING
    for status, kind in _STATUSES:
        if re.search(rf"\b{status}\b", text):
            return kind
    return Kind.PASSING if _PASSING_WORDS.search(text) else Kind.DAMAGE


def _kind_of_number(number: int) -> Kind:
    for numbers, kind in (
        (_DAMAGE, Kind.DAMAGE),
        (_MACHINE, Kind.MACHINE),
        (_PASSING, Kind.PASSING),
    ):
        if number in numbers:
            return kind
    return Kind.REFUSED
