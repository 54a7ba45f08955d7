"""The exceptions that speak to the user."""

import difflib
from collections.abc import Iterable

TRY_AGAIN_STATUS = 75
"""Exit status of what may go well when it is started again: EX_TEMPFAIL of sysexits.h, which
launchers know."""


class UserError(Exception):
    """Wrong input.

    The message is one line with the names and numbers; commands print it and exit with status 1.
    """


class UsageError(UserError):
    """A command line that asks for what cannot be; exit status 2."""


class TryAgainError(UserError):
    """What may go well when the same command is started again, as a launcher does; exit status
    75."""


class StoppedError(UserError):
    """The command was told to stop and has saved; exit status 143, as of a process that SIGTERM
    ended."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'X'?` for the known name closest to `name`, or a list of the known
    ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
