"""The one exception that speaks to the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input. The message is one line with the names and numbers; commands print it and exit with status 1."""


class UsageError(UserError):
    """A command line that asks for what cannot be; exit status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'X'?` for the known name closest to `name`, or a list of the known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
