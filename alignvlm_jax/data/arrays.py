"""Named arrays in one .npz file, on this machine or in a bucket."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from alignvlm_jax.data import filesystem
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import faults

DIRECTORY_BYTES = 1 << 16
"""More than the list of a file's arrays takes."""


def write(path: str | Path, named: Mapping[str, np.ndarray | str]) -> None:
    """Writes a file, beside `path` first.

    Raises:
      UserError: it cannot be written, as on a full disk.
    """
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            np.savez(file, **named)
        os.replace(beside, path)
    except OSError as err:
        raise faults.as_error(f"cannot write {path}: {err.strerror or err}", err) from err
    finally:
        beside.unlink(missing_ok=True)


def checksums(path: str, size: int) -> dict[str, int]:
    """Returns the CRC-32 of every array of a file of so many bytes. They stand at its end, which
    alone is read; of a file that is damaged there, that of its end.

    Raises:
      UserError: it cannot be read.
    """
    try:
        tail = filesystem.read_range(path, max(0, size - DIRECTORY_BYTES), size)
    except OSError as err:
        raise faults.as_error(f"{path} cannot be read ({err})", err) from err
    try:
        # A zip file's directory is its end, and where it begins is counted from there.
        with zipfile.ZipFile(io.BytesIO(tail)) as stored:
            return {member.filename: member.CRC for member in stored.infolist()}
    except zipfile.BadZipFile:
        return {"": zlib.crc32(tail)}


def read(path: str, size: int, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of a file of so many bytes, those of some names or all; nobody may write to
    them.

    Raises:
      UserError: it is missing, damaged, or lacks one of the names.
    """
    try:
        # Of a bucket whole, in pieces: an array is read by many small reads, which would be a
        # request each.
        file = io.BytesIO(filesystem.read_whole(path, size)) if filesystem.is_remote(path) else path
        with np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in (stored if names is None else names)}
    except FileNotFoundError as err:
        raise UserError(f"{path} is missing") from err
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise faults.as_error(f"{path} cannot be read ({err})", err) from err
    for array in found.values():
        array.setflags(write=False)
    return found
