"""What commands share in how they are called: the name that was typed, and parsers with it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError, closest

SCRIPT = "alignvlm"
"""The console script that installing the package makes (pyproject.toml)."""
MADE = {
    "runs/demo": "; `make demo` makes it",
    "weights/smollm2": "; `make weights` makes it",
}
"""What makes the folders that the README names."""
MAX_NAMED = 5


def program() -> str:
    """Returns how this program was called, for usage lines: `alignvlm` or `python -m ...`."""
    # stem: Windows' scripts end in .exe.
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m alignvlm_jax"


def again() -> list[str]:
    """Returns the words that start this program again, with the same Python."""
    if program() == SCRIPT:
        return [SCRIPT]
    return [sys.executable, "-m", "alignvlm_jax"]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, which for an unknown flag has the nearest known one."""

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help lists the flags\n")

    def _hint(self, unknown: Sequence[str]) -> str:
        """Returns a hint to the nearest flag, for the first argument that has one near."""
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        names = [one.partition("=")[0] for one in unknown if one.startswith("--")]
        close = next(filter(None, (closest(name, known) for name in names)), "")
        return f"; did you mean {close!r}" if close else ""


def parser(command: str, **settings: Any) -> argparse.ArgumentParser:
    """Returns a parser of a command's flags.

    Flags are not abbreviated: one that is added later would change what an abbreviation means.

    Args:
      command: its name.
      **settings: those of ArgumentParser.
    """
    return _Parser(prog=f"{program()} {command}", allow_abbrev=False, **settings)


def check_exists(what: str, where: Path) -> None:
    """Raises UserError where there is nothing at a path, before jax is imported to look into it.

    Nothing is said of a bucket, which is asked later, nor as one process of several: others wait
    until this one has joined them, and only then can be told.
    """
    if _is_here(where) and not where.exists():
        raise UserError(f"no {what} at {where}: there is no such file or folder")


def check_run(where: Path) -> None:
    """Raises UserError where there can be no run or checkpoint at a path, as `check_exists`; the
    message names those that are near."""
    if not _is_here(where):
        return
    if where.exists() and not where.is_dir():
        raise UserError(f"no run at {where}: it is a file, no folder")
    around = where if where.exists() else where.parent
    runs = [str(one.parent) for one in sorted(around.glob("*/checkpoints"))][:MAX_NAMED]
    hint = f"; there are {', '.join(runs)}" if runs else ""
    if not where.exists():
        hint = next((made for end, made in MADE.items() if str(where).endswith(end)), hint)
        raise UserError(f"no run at {where}: there is no such folder{hint}")
    if runs and not (where / "checkpoints").exists():
        raise UserError(f"no run at {where} itself{hint}")


def _is_here(where: Path) -> bool:
    return not storage.is_bucket(where) and not several_processes()


def several_processes() -> str | None:
    """Returns the environment variable that makes this one process of several, or None."""
    if os.environ.get("ALIGNVLM_NUM_PROCESSES", "1") != "1":
        return "ALIGNVLM_NUM_PROCESSES"
    return (
        "ALIGNVLM_AUTO_DISTRIBUTED" if os.environ.get("ALIGNVLM_AUTO_DISTRIBUTED") == "1" else None
    )
