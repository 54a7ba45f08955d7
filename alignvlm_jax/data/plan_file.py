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

from alignvlm_jax import storage

MIN_RECORDS = 1 << 20
"""Plans of fewer records are made by each process for itself: that takes less than a second."""
KEPT_SECONDS = 7 * 24 * 3600
"""Age at which what a run has left behind is removed."""
MAX_BYTES = 16 << 30
"""Of all plans together: those of fifty million records take one gigabyte an epoch."""
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
    made: Mapping[str, np.ndarray] | None = None
    try:
        place = _folder()
        folder = place / key
        found = _read(folder)
        if found is None:
            with _locked(place / f"{key}.lock"):
                # Another process may have made it while this one waited.
                found = _read(folder)
                if found is None:
                    made = make()
                    _write(folder, made)
                    found = _read(folder)
            _tidy_up(place, key, outdated)
        if found is not None:
            return found
        logging.warning("each process makes its own plan, since %s cannot be read", folder)
    except OSError as err:
        logging.warning("each process makes its own plan, since none can be shared: %s", err)
    # What was made and could not be written is not computed again.
    return dict(make() if made is None else made)


def _read(folder: Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays in a folder; None where they are not all there, or damaged."""
    try:
        return {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in (folder / MADE).read_text().split()
        } or None
    # Of a file that was cut short numpy raises one of the latter.
    except (OSError, ValueError, EOFError):
        return None


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
    shutil.rmtree(folder, ignore_errors=True)  # what is damaged, or a killed process has left
    folder.mkdir()
    try:
        # Not in one file: an array that is compressed or amid others could not be mapped by numpy.
        for name, array in made.items():
            with open(folder / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                # A machine that loses its power must not keep `MADE` and half of an array.
                os.fsync(file.fileno())
        storage.write_whole(folder / MADE, " ".join(made))
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)  # gives a full disk its room back
        raise


def _tidy_up(place: Path, key: str, outdated: str) -> None:
    """Removes arrays that nobody asks for, and the oldest of those that take more than `MAX_BYTES`
    together, but not `key`. Who has them mapped keeps them all the same."""
    before = time.time() - KEPT_SECONDS
    room = MAX_BYTES
    for changed, path in sorted(_entries(place), reverse=True):
        with contextlib.suppress(OSError):
            # Without `MADE` another process may be writing it.
            is_made = (path / MADE).exists()
            if is_made:
                room -= sum(file.stat().st_size for file in path.iterdir())
            is_old = changed < before or path.name.removesuffix(".lock") == outdated
            if path.name != key and (is_old or (is_made and room < 0)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _entries(place: Path) -> Iterator[tuple[float, Path]]:
    """Yields when each file and folder in a folder changed, and its path."""
    for path in place.iterdir():
        # Another process may remove it meanwhile.
        with contextlib.suppress(OSError):
            yield path.stat().st_mtime, path
