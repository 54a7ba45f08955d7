"""A disk that is full at a random moment: a small file system of its own, filled but for a random
rest."""

import contextlib
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.stress import setting, workdirs
from tests.stress.setting import Setting
from tests.stress.workdirs import Local, Wrong

FULL = re.compile("[Nn]o space left|MB are free")
MIB = 32
"""Of the file system; a whole run takes less."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of so many MiB at `folder`, or Wrong where it cannot be mounted (it takes
    root)."""
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MIB}m", "tmpfs", folder], capture_output=True
    )
    if made.returncode:
        raise Wrong(
            f"cannot mount a tmpfs ({made.stderr.decode().strip()}): this case is run as root"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def unmount(folder: Path) -> None:
    """Takes away what trials that were cut short have left mounted below a folder."""
    for line in Path("/proc/mounts").read_text().splitlines():
        # Spaces are written as \\040 there.
        mounted = Path(line.split()[1].replace("\\040", " "))
        if mounted.is_relative_to(folder):
            subprocess.run(["umount", "--lazy", mounted], check=True)


def full(shared: Setting, number: int, rng: random.Random, scratch: Path) -> dict:
    """One run that finds the disk full, ends with one line, and goes on once there is room."""
    reference = shared.reference(1)
    with small_disk(scratch / "disk") as disk, setting.local(shared, scratch) as trial:
        trial.workdir = Local(disk / "run")
        told = {}
        room = rng.randrange(16, 700) * 1024
        ballast = disk / "ballast"
        with ballast.open("wb") as file:
            file.write(bytes(MIB * 2**20 - room))
        for attempts in range(3):
            newest = workdirs.newest(trial.workdir)
            attempt = shared.train(trial, 1)
            try:
                [status] = attempt.wait()
            finally:
                attempt.kill()
            if workdirs.newest(trial.workdir) < newest:
                raise Wrong(f"checkpoint {newest} is gone")
            if status == 0:
                break
            errors = attempt.errors()
            text = attempt.printed()
            if status != 1 or len(errors) != 1 or not FULL.search(errors[0]) or "Traceback" in text:
                raise Wrong(
                    f"with {room} bytes free it ended with {status}: {errors or text[-300:]}"
                )
            told[f"full at step {workdirs.newest(trial.workdir)}"] = 1
            if attempts == 0 and rng.random() < 0.3:
                continue  # The same again, while it is still full.
            ballast.unlink(missing_ok=True)
        else:
            raise Wrong(f"not done after there was room: {attempt.errors()}")
        # A last line may have been cut by the full disk itself; the run cut it off when it went on.
        setting.check_done(trial, reference)
    return {"faults": sum(told.values()), "told": told}
