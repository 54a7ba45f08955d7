"""Which code a run is of."""

import functools
import os
import pathlib
import subprocess


@functools.cache
def git_hash() -> str:
    """Returns the commit of the code that runs, with "-dirty" where it was changed since; "unknown"
    outside a checkout.

    The launch scripts name it where there is no .git: in ALIGNVLM_COMMIT, or in the file COMMIT of
    an image or a host.
    """
    noted = pathlib.Path(__file__).parents[2] / "COMMIT"
    if commit := os.environ.get("ALIGNVLM_COMMIT"):
        return commit
    if noted.is_file():
        return noted.read_text().strip()
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "--no-optional-locks"]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
