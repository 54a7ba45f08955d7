"""What an error of reading or writing is about: the files, the storage now, or this machine.

It decides whether a command may be started again, and what happens to a checkpoint. Only what its
files themselves show sets it aside; a storage that does not answer, or refuses, says nothing about
them, and shall not cost a run its newest state.
"""

import enum
import errno
import re
import socket
import urllib.parse
from collections.abc import Iterator

from alignvlm_jax.errors import TryAgainError, UserError


class Kind(enum.Enum):
    """Of an error."""

    PASSING = "passing"
    """Of the storage, and may be gone at the next try."""
    REFUSED = "refused"
    """Of the storage, and will not pass by itself: no permission, or it cannot do that."""
    MACHINE = "machine"
    """Of this machine: no memory, no file descriptors, a device."""
    DAMAGE = "damage"
    """Of the files."""


_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ}
_MACHINE = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EPIPE,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTUNREACH, errno.ESHUTDOWN,
}  # fmt: skip
# All others are of what was asked for, such as EACCES, EROFS, ENAMETOOLONG, EINVAL.

# Of tensorstore's messages, which are ValueErrors whatever happened. A status stands at the
# beginning of one, and again where it is passed on; the numbers are of the system's errors and of
# HTTP.
_PATH = re.compile(
    r"(?<![\w.])(?!HTTP/|input/output)(?:\w+:/)?[\w.=-]*(?:/[^\s/'\"\],;:]*)+", re.IGNORECASE
)
"""What a path is called says nothing: gs://bucket/lr-timeout/7."""
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
    """Returns what an error says, also one that others were raised from: what came first is the
    reason. `about` is the path that messages may name, where it is known: with spaces in it nothing
    tells where it ends."""
    kinds = [_kind_of_one(one, about) for one in chain(err)]
    return next((kind for kind in reversed(kinds) if kind is not Kind.DAMAGE), Kind.DAMAGE)


def as_error(message: str, err: BaseException) -> UserError:
    """Returns what to raise, with this message, for an error of the storage: TryAgainError where it
    may pass."""
    return (TryAgainError if kind_of(err) is Kind.PASSING else UserError)(message)


def chain(err: BaseException) -> Iterator[BaseException]:
    """Goes through an error and all that it was raised from."""
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
    # TLS numbers its errors as it likes: 1, which is EPERM, among them. So do resolvers of names.
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
