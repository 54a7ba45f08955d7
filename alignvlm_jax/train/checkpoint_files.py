"""The files of one checkpoint as orbax writes and reads them, with what it lacks: checksums, and a
removal that is never seen half done."""

import json
import logging
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from alignvlm_jax import storage
from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.parallel import distributed
from alignvlm_jax.storage import Path, faults
from alignvlm_jax.storage.faults import Kind

COMMITTED = "commit_success.txt"
"""Orbax's; the last file of a checkpoint that is written."""
CHECKSUM = "crc32"
"""Of the other fields of a JSON file."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""Orbax's, in the name of a folder that is not finished."""


def handlers(host_gb: float | None) -> dict[str, Any]:
    """Returns what writes and reads each item of a checkpoint; `host_gb` bounds what a save copies
    and writes at once."""
    return {
        "state": ocp.PyTreeCheckpointHandler(
            # Of the two formats this one can have checksums (`_codecs_with_checksums`).
            use_zarr3=True,
            save_concurrent_gb=host_gb,
            save_device_host_concurrent_gb=host_gb,
        ),
        "data": ocp.JsonCheckpointHandler(),
        "metadata": ocp.JsonCheckpointHandler(),
    }


def pytree_restore(abstract: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)


def shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every array of a tree, or of what orbax says of one, by
    path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        _path_of(keys): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for keys, x in leaves
        if hasattr(x, "shape")
    }


def _path_of(keys: Sequence[Any]) -> str:
    return "/".join(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys
    )


def with_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """A bit that flips in a number leaves it a number."""
    return {**fields, CHECKSUM: _checksum(fields)}


def without_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError where it is another one; checkpoints from before have none."""
    fields = dict(fields)
    if CHECKSUM in fields and (stored := fields.pop(CHECKSUM)) != (found := _checksum(fields)):
        raise ValueError(f"its checksum is {found}, and {stored} was written")
    return fields


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def first_line(err: BaseException) -> str:
    if "See full TensorStore details" in str(err) and err.__cause__:
        # It prints how the array is opened; the cause says what is wrong.
        return first_line(err.__cause__)
    return (str(err).splitlines() or [type(err).__name__])[0]


class Deleter:
    """Removes checkpoints that are superseded: each at once no longer a checkpoint, then file by
    file."""

    def __init__(self, folder: Path, renames: bool):
        self._folder = folder
        self._renames = renames

    def delete(self, step: int) -> None:
        """Removes one."""
        if not distributed.is_main():
            return
        old = self._folder / str(step)
        if self._renames:
            doomed = self._folder / f"{step}{UNFINISHED}-removed"
            storage.remove_tree(doomed)
            old.rename(doomed)
            old = doomed
        else:
            (old / COMMITTED).unlink(missing_ok=True)
        storage.remove_tree(old)

    def delete_steps(self, steps: Sequence[int]) -> None:
        """Removes several."""
        for step in steps:
            self.delete(step)

    def close(self) -> None:
        """Nothing is open."""


def _codecs_with_checksums(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns orbax's description of an array's files, with a checksum behind every chunk.

    Orbax has none for them, nor a switch: a bit that flips in a chunk is read as other numbers. It
    stands in the description, so that every reader finds it.
    """
    described = _orbax_codecs(*args, **kwargs)
    codecs = described["codecs"][0]["configuration"]["codecs"]
    for codec in codecs:
        if codec["name"] == "zstd":
            # As in the other format: weights hardly shrink at any.
            codec["configuration"]["level"] = 1
    codecs.append({"name": "crc32c"})
    return described


_orbax_codecs = tensorstore_utils._build_zarr3_metadata
tensorstore_utils._build_zarr3_metadata = _codecs_with_checksums


class _NotOfOrbax(logging.Filter):
    """Of a terminal: orbax logs every step of every save, and a traceback where we print one
    line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != "absl" or "/orbax/" not in record.pathname


def quiet_terminal() -> None:
    """Leaves orbax's lines to log files."""
    for handler in (
        *logging.root.handlers,
        *logging.getLogger("absl").handlers,
        logging.lastResort,
    ):
        stream = getattr(getattr(handler, "python_handler", handler), "stream", None)
        is_quiet = any(isinstance(one, _NotOfOrbax) for one in handler.filters)
        if stream in (sys.stderr, sys.stdout, sys.__stderr__) and not is_quiet:
            handler.addFilter(_NotOfOrbax())


def may_pass(err: BaseException) -> bool:
    """Whether what was not saved may be saved when the run is started again. Not where there is no
    room or no permission, or the folder is gone; but where another process was lost, with which
    this one wrote."""
    for one in faults.chain(err):
        if isinstance(one, UserError):
            return isinstance(one, TryAgainError)
        if isinstance(one, FileNotFoundError):
            return False
    return is_of_device(err) or faults.kind_of(err) not in (Kind.REFUSED, Kind.MACHINE)


def is_of_device(err: BaseException) -> bool:
    return any(isinstance(one, jax.errors.JaxRuntimeError) for one in faults.chain(err))


def is_step(name: str) -> bool:
    """Whether a folder's name is that of a step; 010 is none, nor are digits of other scripts."""
    return name.isascii() and name.isdigit() and str(int(name)) == name
