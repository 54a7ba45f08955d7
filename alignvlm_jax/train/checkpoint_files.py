"""The files of a checkpoint: orbax's formats, with checksums and a safe removal added.

Orbax itself has no checksums, and a checkpoint that it removes can be seen half removed.
"""

import base64
import functools
import json
import logging
import sys
import zlib
from collections.abc import Mapping, Sequence
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
"""Name of the file that orbax writes last into a checkpoint."""
CHECKSUM = "crc32"
"""Field of a JSON file with the checksum of its other fields."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""What orbax has in the name of a folder that is not finished."""


def handlers(host_gb: float | None) -> dict[str, Any]:
    """Returns orbax's handler of each item of a checkpoint.

    Args:
      host_gb: the most gigabytes that a save copies to the host and writes at once; None for no
        bound.
    """
    return {
        "state": ocp.PyTreeCheckpointHandler(
            # Only this one of orbax's two formats can have checksums (`_codecs_with_checksums`).
            use_zarr3=True,
            save_concurrent_gb=host_gb,
            save_device_host_concurrent_gb=host_gb,
        ),
        "data": ocp.JsonCheckpointHandler(),
        "metadata": ocp.JsonCheckpointHandler(),
        "tokenizer": ocp.JsonCheckpointHandler(),
    }


def pytree_restore(abstract: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
    """Returns orbax's arguments to read a tree with the shapes, dtypes and shardings of `abstract`.

    With `partial`, arrays that `abstract` lacks are not read.
    """
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)


def shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every array by path, "a/b/c".

    Args:
      tree: a tree of arrays, or of orbax's metadata of them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        _path_of(keys): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for keys, x in leaves
        if hasattr(x, "shape")
    }


def _path_of(keys: Sequence[Any]) -> str:
    """Returns a path of JAX's keys (of dicts, sequences or attributes) as "a/b/c"."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in keys
    )


def packed(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns files as texts that JSON can hold, compressed."""
    return {name: _packed(content) for name, content in files.items()}


def unpacked(texts: Mapping[str, str]) -> dict[str, bytes]:
    """Returns the files that `packed` made texts of.

    Raises:
      ValueError, zlib.error: a text is damaged.
    """
    return {name: zlib.decompress(base64.b64decode(text)) for name, text in texts.items()}


# A tokenizer of 128,000 words has ten megabytes, which take half a second, and stay the same from
# save to save.
@functools.lru_cache(maxsize=16)
def _packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def with_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a JSON file with their checksum.

    JSON by itself reveals no flipped bit: a number becomes another number.
    """
    return {**fields, CHECKSUM: _checksum(fields)}


def without_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a JSON file without their checksum, after checking it.

    Fields without a checksum, as in old checkpoints, pass.

    Raises:
      ValueError: the checksum is wrong.
    """
    fields = dict(fields)
    if CHECKSUM in fields and (stored := fields.pop(CHECKSUM)) != (found := _checksum(fields)):
        raise ValueError(f"its checksum is {found}, and {stored} was written")
    return fields


def _checksum(fields: dict[str, Any]) -> int:
    # Sorted, since what is read back may have its keys in another order.
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def first_line(err: BaseException) -> str:
    """Returns the first line of the message of an error, or the name of its type."""
    if "See full TensorStore details" in str(err) and err.__cause__:
        # This message only says how the array is opened; its cause says what is wrong.
        return first_line(err.__cause__)
    return (str(err).splitlines() or [type(err).__name__])[0]


class Deleter:
    """An orbax-style deleter of superseded checkpoints that never leaves half of one behind.

    In one step a folder is no checkpoint any more; then it is removed file by file.
    """

    def __init__(self, folder: Path, renames: bool):
        """Takes the folder of checkpoints, and whether its storage can rename folders."""
        self._folder = folder
        self._renames = renames

    def delete(self, step: int) -> None:
        """Removes the checkpoint of a step; only the main process does so."""
        if not distributed.is_main():
            return
        old = self._folder / str(step)
        if self._renames:
            # A name that orbax takes for an unfinished save, and so for no checkpoint. One of an
            # interrupted removal is in the way of the rename.
            doomed = self._folder / f"{step}{UNFINISHED}-removed"
            storage.remove_tree(doomed)
            old.rename(doomed)
            old = doomed
        else:
            # A bucket cannot rename a folder in one step: without this file it is no checkpoint.
            (old / COMMITTED).unlink(missing_ok=True)
        storage.remove_tree(old)

    def delete_steps(self, steps: Sequence[int]) -> None:
        """Removes the checkpoints of several steps."""
        for step in steps:
            self.delete(step)

    def close(self) -> None:
        """Does nothing: orbax calls it, but nothing is open here."""


def _codecs_with_checksums(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns orbax's description of an array's files, with a checksum behind every chunk.

    Without it a bit that flips in a chunk is read as another number. The checksum is part of the
    description, so that every reader of the format verifies it.
    """
    described = _orbax_codecs(*args, **kwargs)
    codecs = described["codecs"][0]["configuration"]["codecs"]
    for codec in codecs:
        if codec["name"] == "zstd":
            # The level of orbax's other format: weights hardly compress at any level, and higher
            # ones only take time.
            codec["configuration"]["level"] = 1
    codecs.append({"name": "crc32c"})
    return described


# Orbax has no option for it: its private function is replaced.
_orbax_codecs = tensorstore_utils._build_zarr3_metadata
tensorstore_utils._build_zarr3_metadata = _codecs_with_checksums


class _NotOfOrbax(logging.Filter):
    """A filter for the terminal that drops the messages of orbax.

    Orbax logs every step of every save, and tracebacks of errors that are reported in one line.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != "absl" or "/orbax/" not in record.pathname


def quiet_terminal() -> None:
    """Keeps the messages of orbax off the terminal; log files still have them."""
    # absl's handler wraps Python's; `lastResort` is the one that Python uses if there is no other.
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
    """Whether a failed save may succeed when the run is started again.

    It may if another process, with which this one wrote, was lost. It may not if there is no room
    or no permission, or if the folder is gone.
    """
    for one in faults.chain(err):
        if isinstance(one, UserError):
            return isinstance(one, TryAgainError)
        if isinstance(one, FileNotFoundError):
            return False
    return is_of_device(err) or faults.kind_of(err) not in (Kind.REFUSED, Kind.MACHINE)


def is_of_device(err: BaseException) -> bool:
    """Whether an error, or one of its causes, is of the JAX runtime."""
    return any(isinstance(one, jax.errors.JaxRuntimeError) for one in faults.chain(err))


def whole_steps(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder that are whole, oldest first; none where
    there is no such folder."""
    numbered = [child for child in storage.children(folder) if is_step(child.name)]
    return sorted(int(child.name) for child in numbered if (child / COMMITTED).exists())


def is_step(name: str) -> bool:
    """Whether the name of a folder is that of a step.

    A name with leading zeros is none, nor is one with digits of another script.
    """
    return name.isascii() and name.isdigit() and str(int(name)) == name
