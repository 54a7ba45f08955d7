"""Arrays that one process of a machine computes and the others map.

A plan of fifty million records takes a minute and a gigabyte; on a host of several processes it is
made once. It lies in a folder of temporary files, named by all that it follows from.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from absl import logging

MIN_RECORDS = 1 << 20
"""Plans of fewer records are made by each process for itself: that takes less than a second."""
KEPT_SECONDS = 7 * 24 * 3600
"""Age at which what a run has left behind is removed."""
MADE = "made"


def shared(
    key: str, make: Callable[[], Mapping[str, np.ndarray]], outdated: str = ""
) -> dict[str, np.ndarray]:
    """Returns arrays by name, which are mapped from a file and read-only.

    The first process that asks makes them, the others wait for it. Where they cannot be written, as
    on a full disk, each process makes its own.

    Args:
      key: a file name that differs where the arrays do.
      make: computes the arrays.
      outdated: the key of arrays that nobody will ask for again, which are removed; "" for none.
    """
    try:
        place = _folder()
        folder = place / key
        if not (folder / MADE).exists():
            with _locked(place / f"{key}.lock"):
                # Another process may have made it while this one waited.
                if not (folder / MADE).exists():
                    _write(folder, make())
            _tidy_up(place, outdated)
        names = (folder / MADE).read_text().split()
        return {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in names
        }
    except OSError as err:
        logging.warning("each process makes its own plan, since none can be shared: %s", err)
        return dict(make())


def _folder() -> Path:
    """Returns this user's folder of plans on this machine; raises OSError if it is not theirs."""
    place = Path(tempfile.gettempdir(), f"alignvlm_jax-{os.getuid()}")
    place.mkdir(mode=0o700, exist_ok=True)
    # The name can be guessed: a folder of somebody else must not say what is trained on.
    if place.stat().st_uid != os.getuid() or place.is_symlink():
        raise PermissionError(f"{place} belongs to another user")
    return place


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among the processes of this machine, which ends with the process."""
    with open(path, "w") as file:
        # Of the open file: the system lets go of it even where the process was killed.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, made: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a new folder, in which `MADE` comes last and says that all are there."""
    shutil.rmtree(folder, ignore_errors=True)  # what a process that was killed has left
    folder.mkdir()
    # Not in one file: an array that is compressed or amid others could not be mapped by numpy.
    for name, array in made.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    (folder / f"{MADE}.tmp").write_text(" ".join(made))
    os.replace(folder / f"{MADE}.tmp", folder / MADE)


def _tidy_up(place: Path, outdated: str) -> None:
    """Removes arrays that nobody asks for. Who has them mapped keeps them all the same."""
    before = time.time() - KEPT_SECONDS
    for folder in place.iterdir():
        with contextlib.suppress(OSError):
            if folder.name.removesuffix(".lock") == outdated or folder.stat().st_mtime < before:
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
