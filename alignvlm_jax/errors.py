"""Exceptions whose message is for the user."""

import difflib
import signal
from collections.abc import Iterable, Sequence

TRY_AGAIN_STATUS = 75
"""Exit status of a temporary failure (EX_TEMPFAIL of sysexits.h), after which launchers restart."""


MAX_KNOWN = 40
"""Names that a message lists at most: a folder may hold thousands."""


class UserError(Exception):
    """An error of the user's input.

    The message is one line with the names and numbers; commands print it and exit with status 1.
    """


class UsageError(UserError):
    """An error of the command line; exit status 2."""


class TryAgainError(UserError):
    """A temporary failure: the same command may succeed if it is started again; exit status 75."""


class StoppedError(UserError):
    """The end of a command that was told to stop and has saved.

    The exit status is that of a process that the signal ended: 143 of SIGTERM, 130 of SIGINT.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        """
        Args:
          message: of what is saved, and how to go on.
          number: of the signal.
        """
        super().__init__(message)
        self.status = 128 + number


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint for a message: `; did you mean 'X'?`, or else the list of known names."""
    known = sorted(known)
    if close := closest(name, known):
        return f"; did you mean {close!r}?"
    return f"; known: {', '.join(known[:MAX_KNOWN])}{', ...' if known[MAX_KNOWN:] else ''}"


def closest(name: str, known: Iterable[str]) -> str:
    """Returns the known name that is spelt most alike, "" where none is."""
    # A cutoff below difflib's default of 0.6, since a wrong suggestion does no harm.
    return "".join(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5))


def one_line(err: BaseException) -> str:
    """Returns the message of an exception on one line of at most 200 characters, or else the name
    of its type."""
    return " ".join(str(err).split())[:200] or type(err).__name__


def listed(texts: Sequence[str], most: int) -> str:
    """Returns the first `most` texts for messages, and how many more there are: `a, b and 3
    more`."""
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} more" if more > 0 else "")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, for messages: `1 tile`, `2,000 tiles`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def how_to_install(extra: str, target: str) -> str:
    """Returns how to install what is missing, for messages.

    Args:
      extra: the extra of pyproject.toml that has it.
      target: the target of the Makefile that installs it in a checkout.
    """
    return f"pip install 'alignvlm_jax[{extra}]', or `make {target}` in a checkout"


def stage_flag(stage: str, field: str) -> str:
    """Returns the flag of a stage's field, to type, such as `--config.stages.a.train.num_steps`. A
    config without stages is one of the name "train", whose fields are the config's own."""
    return f"--config.{'' if stage == 'train' else f'stages.{stage}.'}{field}"
