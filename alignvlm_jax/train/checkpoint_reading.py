"""What the checkpoints of a folder hold, read by one process for itself; what is damaged is told
from what the storage does not give now."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.config import Config, renamed
from alignvlm_jax.errors import TryAgainError, UserError, listed
from alignvlm_jax.storage import Path, faults
from alignvlm_jax.storage.faults import Kind
from alignvlm_jax.train import checkpoint_files
from alignvlm_jax.train.checkpoint_files import is_of_device
from alignvlm_jax.train.state import Params, TrainState

T = TypeVar("T")

LAYOUT_VERSION = 1
"""Of the folders of `checkpoint` and of parameter paths; raise it when an older checkpoint can no
longer be read."""
MAX_DIFFERENCES = 3
"""Named in the message; the rest is counted."""
PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries to read what the storage does not give."""


class BrokenCheckpoint(Exception):
    """A checkpoint that cannot be read; the message is one line."""


class Reader:
    """The whole checkpoints below one folder. A process reads by itself and waits for no other, so
    that one that fails can tell."""

    def __init__(self, folder: Path, handlers: dict[str, Any]):
        """`handlers` are those of `checkpoint_files.handlers`."""
        self.folder = storage.absolute(folder)
        self._handlers = handlers

    def latest(self) -> int | None:
        """Returns the newest step that is whole, or None."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps that are whole, oldest first."""
        return checkpoint_files.whole_steps(self.folder)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state on the shardings of `abstract`, whatever mesh wrote it, and the
        position in the data.

        Raises:
          BrokenCheckpoint: its files are damaged, or not all there.
          UserError: the storage does not give it now, or it holds another model; the checkpoint may
            well be whole.
        """

        def read(folder: Path) -> tuple[TrainState, dict[str, Any]]:
            restored = self._handlers["state"].restore(
                folder / "state", args=checkpoint_files.pytree_restore(abstract)
            )
            position = renamed.names(self._read_json(folder, "data"), renamed.POSITION)
            position["next_sequence"]  # Without it this is no position: KeyError says so.
            return restored, position

        return self._read(step, read, abstract)

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Returns the parameters that `abstract` names, on its shardings; others are not read."""
        wanted = {"params": abstract}

        def read(folder: Path) -> Params:
            args = checkpoint_files.pytree_restore(wanted, partial=True)
            found = self._handlers["state"].restore(folder / "state", args=args)["params"]
            # Of what is not there orbax gives back, without a word, what it was asked for.
            if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(found)):
                raise ValueError("arrays are missing")
            return found

        return self._read(step, read, wanted)

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what `describe` gave, with the step and an id of the run; UserError for a layout
        that this version cannot read, and for a checkpoint under another step's name."""
        metadata, layout = self._read(
            step, lambda folder: _with_layout(self._read_json(folder, "metadata"))
        )
        if layout != LAYOUT_VERSION:
            raise UserError(
                f"checkpoint {self.folder / str(step)} has layout {layout}; this version reads "
                f"layout {LAYOUT_VERSION}"
            )
        if metadata.get("step", step) != step:
            raise UserError(
                f"checkpoint {self.folder / str(step)} is of step {metadata['step']}: it was "
                "copied or renamed; move it away, or give it its name again"
            )
        return metadata

    def config(self, step: int) -> Config:
        """Returns the config of the stage that wrote a checkpoint."""
        metadata = self.metadata(step)
        stages = config_lib.from_json(metadata["config"])
        return next(stage for stage in stages if stage.stage == metadata["stage"])

    def tokenizer(self, step: int) -> dict[str, bytes] | None:
        """Returns the files of the tokenizer by name; None of a checkpoint that has none with it,
        as of what `convert` wrote and of earlier versions."""

        def read(folder: Path) -> dict[str, bytes] | None:
            if not (folder / "tokenizer").is_dir():
                if "tokenizer" in self._read_json(folder, "metadata"):
                    raise ValueError("its tokenizer is missing")
                return None
            return checkpoint_files.unpacked(self._read_json(folder, "tokenizer"))

        return self._read(step, read)

    def stored_params(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of every stored parameter by path."""
        return self._read(
            step,
            lambda folder: checkpoint_files.shapes(
                self._handlers["state"].metadata(folder / "state").tree["params"]
            ),
        )

    def _read(self, step: int, read: Callable[[Path], T], wanted: Any = None) -> T:
        """Returns read(folder of the step), tried again while the storage does not answer."""
        name = f"checkpoint {self.folder / str(step)}"
        # A try more than there are pauses: after the last one nothing is waited for.
        for pause in (*PAUSES, None):
            try:
                return read(self.folder / str(step))
            except Exception as err:
                kind = faults.kind_of(err, str(self.folder))
                if kind is Kind.MACHINE or is_of_device(err):
                    raise  # The checkpoint may well be whole.
                if kind is Kind.DAMAGE:
                    if wanted is not None and (differing := self._differences(step, wanted)):
                        raise UserError(f"{name} holds another model: {differing}") from err
                    raise BrokenCheckpoint(
                        f"{name} cannot be read ({checkpoint_files.first_line(err)})"
                    ) from err
                if kind is Kind.REFUSED or pause is None:
                    # What the storage refuses it will refuse again.
                    error = UserError if kind is Kind.REFUSED else TryAgainError
                    reason = f"could not be read now ({checkpoint_files.first_line(err)})"
                    raise error(
                        f"{name} {reason}; it stays as it is: call again when its storage gives it"
                    ) from err
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _read_json(self, folder: Path, item: str) -> dict[str, Any]:
        return checkpoint_files.without_checksum(
            self._handlers[item].restore(folder / item, args=ocp.args.JsonRestore())
        )

    def _differences(self, step: int, wanted: Any) -> str:
        """Returns how a checkpoint's arrays differ from those wanted of it; "" where they do not,
        or nobody knows."""
        try:
            stored = checkpoint_files.shapes(
                self._handlers["state"].metadata(self.folder / str(step) / "state").tree
            )
        except Exception:
            return ""
        lines = []
        for path, array in checkpoint_files.shapes(wanted).items():
            if path not in stored:
                lines.append(f"it has no {path}")
            elif stored[path].shape != array.shape:
                lines.append(
                    f"{path} is {list(stored[path].shape)} there and {list(array.shape)} here"
                )
        return listed(lines, MAX_DIFFERENCES)


def _with_layout(metadata: dict[str, Any]) -> tuple[dict[str, Any], int]:
    return metadata, metadata["layout_version"]
