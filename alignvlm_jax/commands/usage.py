"""What commands share in how they are called: the name that was typed, and parsers with it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from alignvlm_jax import storage
from alignvlm_jax.errors import UserError

SCRIPT = "alignvlm"
"""The console script that installing the package makes (pyproject.toml)."""


def program() -> str:
    """Returns how this program was called, for usage lines: `alignvlm` or `python -m ...`."""
    # stem: Windows' scripts end in .exe.
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m alignvlm_jax"


def again() -> list[str]:
    """Returns the words that start this program again, with the same Python."""
    if program() == SCRIPT:
        return [SCRIPT]
    return [sys.executable, "-m", "alignvlm_jax"]


def parser(command: str, **settings: Any) -> argparse.ArgumentParser:
    """Returns a parser of a command's flags.

    Flags are not abbreviated: one that is added later would change what an abbreviation means.

    Args:
      command: its name.
      **settings: those of ArgumentParser.
    """
    return argparse.ArgumentParser(prog=f"{program()} {command}", allow_abbrev=False, **settings)


def check_exists(what: str, where: Path) -> None:
    """Raises UserError where there is nothing at a path, before jax is imported to look into it.

    Nothing is said of a bucket, which is asked later, nor as one process of several: others wait
    until this one has joined them, and only then can be told.
    """
    if not storage.is_bucket(where) and not several_processes() and not where.exists():
        raise UserError(f"no {what} at {where}: there is no such file or folder")


def several_processes() -> str | None:
    """Returns the environment variable that makes this one process of several, or None."""
    if os.environ.get("ALIGNVLM_NUM_PROCESSES", "1") != "1":
        return "ALIGNVLM_NUM_PROCESSES"
    return (
        "ALIGNVLM_AUTO_DISTRIBUTED" if os.environ.get("ALIGNVLM_AUTO_DISTRIBUTED") == "1" else None
    )
