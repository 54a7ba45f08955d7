"""Files (.npz) of named arrays, on this machine or in a bucket."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from alignvlm_jax.data import filesystem
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import faults

MAPPED_BYTES = 1 << 24
"""Size from which an array of a local file is mapped and not read."""
BLOCK_BYTES = 1 << 22
DIRECTORY_BYTES = 1 << 16
"""Bytes at the end of a file that certainly hold its list of arrays."""


def write(path: str | Path, named: Mapping[str, np.ndarray | str]) -> None:
    """Writes arrays and texts to a local file in one step: a reader never sees a part of it.

    Raises:
      UserError: the file cannot be written, as on a full disk.
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
    """Returns the CRC-32 of every array of a file, by name.

    Only the end of the file is read, where these checksums are. If it is damaged there, the
    result is the checksum of the end itself, under the name "".

    Args:
      path: path or URI of the file.
      size: its size in bytes.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        tail = filesystem.read_range(path, max(0, size - DIRECTORY_BYTES), size)
    except OSError as err:
        raise faults.as_error(f"{path} cannot be read ({err})", err) from err
    try:
        # zipfile finds the directory by offsets from the end of a file, and so also in a tail that
        # lacks the arrays themselves.
        with zipfile.ZipFile(io.BytesIO(tail)) as stored:
            return {member.filename: member.CRC for member in stored.infolist()}
    except zipfile.BadZipFile:
        return {"": zlib.crc32(tail)}


def read(path: str, size: int, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Returns arrays of a file by name, read-only.

    Args:
      path: path or URI of the file.
      size: its size in bytes, which matters only in a bucket.
      names: the arrays to read; None reads all.

    Raises:
      UserError: the file is missing, damaged, or lacks one of the names.
    """
    try:
        # A file in a bucket is read whole, in large pieces: numpy reads an array by many small
        # reads, each of which would be a request.
        file = io.BytesIO(filesystem.read_whole(path, size)) if filesystem.is_remote(path) else path
        with np.load(file, allow_pickle=False) as stored:
            wanted = list(stored if names is None else names)
            # Large arrays stay on the disk, and processes of a machine share what they read.
            found = (
                {name: _mapped(path, stored.zip, name) for name in wanted} if file == path else {}
            )
            found = {name: array for name, array in found.items() if array is not None}
            found |= {name: stored[name] for name in wanted if name not in found}
    except FileNotFoundError as err:
        raise UserError(f"{path} is missing") from err
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise faults.as_error(f"{path} cannot be read ({err})", err) from err
    # Read-only, since indexes are cached and shared by all of the process.
    for array in found.values():
        array.setflags(write=False)
    return found


def _mapped(path: str, stored: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """Returns an array of a local file, mapped; None where it is small, or is not there.

    Raises:
      zipfile.BadZipFile: the array is damaged.
    """
    member = next((one for one in stored.infolist() if one.filename == f"{name}.npy"), None)
    if member is None or member.file_size < MAPPED_BYTES or member.compress_type:
        return None
    with stored.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file)
        size = file.tell()
        # To the end, where the checksum is compared, but without keeping any of it.
        while file.read(BLOCK_BYTES):
            pass
    if is_fortran or dtype.hasobject:
        return None
    with open(path, "rb") as file:
        # The header before a member has its name, and a field whose length is not in the directory.
        file.seek(member.header_offset + 26)
        begin = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + size
    return np.memmap(path, dtype, "r", begin, shape)
