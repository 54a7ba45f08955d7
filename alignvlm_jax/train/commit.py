"""The commit of the code that a run uses."""

import functools
import os
import pathlib
import subprocess


@functools.cache
def git_hash() -> str:
    """Returns the git commit of the running code, with "-dirty" if files were changed since.

    Without a .git folder it comes from the environment variable ALIGNVLM_COMMIT, or from the file
    COMMIT that the launch scripts put into an image or onto a host. Without these it is "unknown".
    """
    root = pathlib.Path(__file__).parents[2]
    noted = root / "COMMIT"
    if commit := os.environ.get("ALIGNVLM_COMMIT"):
        return commit
    if noted.is_file():
        return noted.read_text().strip()
    # An installed package may lie within the checkout of another project.
    if not (root / ".git").exists():
        return "unknown"
    # --no-optional-locks: `describe --dirty` would refresh the index, which many processes may do
    # at once. --exclude leaves out tags, so that the commit itself is named.
    command = ["git", "-C", str(root), "--no-optional-locks"]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
