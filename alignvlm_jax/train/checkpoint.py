"""Checkpoints of a run: orbax composites of state, data position and metadata. The only file that knows orbax.

    workdir/checkpoints/STEP/{state, data, metadata, metrics}

STEP counts over all stages. A folder appears under its final name only when it is whole.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import Config
from alignvlm_jax.data import sources
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.train import state
from alignvlm_jax.train.state import Params, TrainState

T = TypeVar("T")

LAYOUT_VERSION = 1
"""Of the folder above and of parameter paths; raise it when an older checkpoint can no longer be read."""

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FOLDER = "checkpoints"


class BrokenCheckpoint(Exception):
    """A checkpoint that cannot be read; the message is one line."""


class Checkpoints:
    """The checkpoints below one folder, written asynchronously.

    Kept: the newest `keep`, the one with the least validation loss of the newest stage, and those at `stage_ends`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        stage_ends: tuple[int, ...] = (),
        read_only: bool = False,
        host_gb: float | None = None,
    ):
        """`host_gb` bounds what a save copies and writes at once, and makes its caller wait; it must hold any array."""
        # Orbax logs every step of every save, and a traceback where we print one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False)
        kept = policies.AnyPreservationPolicy([policies.LatestN(keep), policies.CustomSteps(stage_ends), best])
        # Without a best_fn no metrics are written, and the policy would have nothing to compare after a resume.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept, best_fn=_quality, read_only=read_only, cleanup_tmp_directories=not read_only
        )
        self.folder = folder
        # Named at once: a manager that has not saved yet could not read the shapes of a stored state otherwise.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(save_concurrent_gb=host_gb, save_device_host_concurrent_gb=host_gb),
            "data": ocp.JsonCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)
        self._saving: int | None = None
        self._unraisable_hook = sys.unraisablehook

    def __enter__(self) -> "Checkpoints":
        sys.unraisablehook = self._report_unraisable
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is KeyboardInterrupt:  # The second Ctrl-C means now: do not wait for a save.
            return
        # An error on its way out is the one to report, not what it does to the save under way.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.wait()
            self._manager.close()
        sys.unraisablehook = self._unraisable_hook

    def latest(self) -> int | None:
        """Returns the newest step that is whole, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps that are whole, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, live: TrainState, *, next_row: int, metadata: Mapping[str, Any], metrics: Mapping | None
    ) -> None:
        """Starts to write a checkpoint; `live` may be donated at once.

        Args:
          step: over all stages; must be new.
          live: the state.
          next_row: rows of this stage consumed so far, over all processes.
          metadata: of `describe`.
          metrics: {"stage": index, "answer_loss": of validation at this very step}, or None without validation.

        Raises:
          UserError: this save, or the one before, could not be written.
        """
        self.wait()
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(live),
            data=ocp.args.JsonSave({"next_row": next_row}),
            metadata=ocp.args.JsonSave(dict(metadata)),
        )
        self._saving = step
        self._check_space(live)
        try:
            written = self._manager.save(step, args=args, metrics=metrics)
        except Exception as err:
            raise self._save_error(err) from err
        if not written:
            raise UserError(f"checkpoint {self.folder / str(step)} was not written: the step exists already")

    def check(self) -> None:
        """Raises UserError if a save under way has failed; does not wait."""
        try:
            self._manager.check_for_errors()
        except Exception as err:
            raise self._save_error(err) from err

    def wait(self) -> None:
        """Waits until the last save is whole; UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as err:
            raise self._save_error(err) from err

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, int]:
        """Returns the state on the shardings of `abstract`, whatever mesh wrote it, and the next row.

        Raises:
          BrokenCheckpoint: it cannot be read.
        """
        restored = self._restore(step, state=_pytree_restore(abstract), data=ocp.args.JsonRestore())
        return restored.state, restored.data["next_row"]

    def restore_params(self, step: int, abstract: Params) -> Params:
        """Returns the parameters that `abstract` names, on its shardings; other parts are not read."""
        restored = self._restore(step, state=_pytree_restore({"params": abstract}, partial=True))
        return restored.state["params"]

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what `describe` gave; UserError for a layout that this version cannot read."""
        metadata = self._restore(step, metadata=ocp.args.JsonRestore()).metadata
        if metadata["layout_version"] != LAYOUT_VERSION:
            raise UserError(
                f"checkpoint {self.folder / str(step)} has layout {metadata['layout_version']}; "
                f"this version reads layout {LAYOUT_VERSION}"
            )
        return metadata

    def config(self, step: int) -> Config:
        """Returns the config of the stage that wrote a checkpoint."""
        metadata = self.metadata(step)
        stages = config_lib.from_json(metadata["config"])
        return next(stage for stage in stages if stage.stage == metadata["stage"])

    def stored_params(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of every stored parameter by path."""
        try:
            tree = self._manager.item_metadata(step).state.tree
            return {
                path: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for path, x in state.flatten(tree["params"]).items()
            }
        except Exception as err:
            raise self._broken(step, err) from err

    def set_aside(self, step: int) -> Path:
        """Renames a broken checkpoint, so that its step can be written again, to STEP.broken, or to STEP.broken.N where
        that is taken; returns the new path."""
        names = (f"{step}.broken{number}" for number in itertools.chain([""], (f".{n}" for n in itertools.count(2))))
        broken = next(self.folder / name for name in names if not (self.folder / name).exists())
        if distributed.is_main():
            (self.folder / str(step)).rename(broken)
        exchange.barrier()
        self._manager.reload()
        return broken

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # That of the machine or a device: the checkpoint may well be whole.
        except Exception as err:
            raise self._broken(step, err) from err

    def _broken(self, step: int, err: Exception) -> BrokenCheckpoint:
        return BrokenCheckpoint(f"checkpoint {self.folder / str(step)} cannot be read ({_first_line(err)})")

    def _report_unraisable(self, problem: "sys.UnraisableHookArgs") -> None:
        """When one array cannot be written, orbax closes its event loop under the others, and each complains."""
        if str(problem.exc_value) != "Event loop is closed":
            self._unraisable_hook(problem)

    def _check_space(self, live: TrainState) -> None:
        """Told before half of it is written; an array takes at most a block more than its size, for its metadata."""
        needed = sum(array.nbytes + 4096 for array in jax.tree.leaves(live))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise self._save_error(OSError(f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"))

    def _save_error(self, err: Exception) -> UserError:
        """The failed step is told from those that stand; orbax's message may run over many lines."""
        self._manager.reload()
        whole = self.latest()
        rest = "there is no earlier one" if whole is None else f"step {whole} stands"
        return UserError(f"could not write checkpoint {self.folder / str(self._saving)}: {_first_line(err)}; {rest}")


def describe(
    stages: tuple[Config, ...], stage: Config, *, train_seconds: float, answer_loss: float | None
) -> dict[str, Any]:
    """Returns a checkpoint's metadata: all that is needed to use it without its workdir, and where it came from."""
    return {
        "layout_version": LAYOUT_VERSION,
        "config": config_lib.to_json(stages),
        "stage": stage.stage,
        "data": sources.fingerprint(*stage.data.folders),
        "train_seconds": train_seconds,
        "validation_answer_loss": answer_loss,
        "git": _git_hash(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def agreed(read: Callable[[], T]) -> T:
    """Returns what reading a checkpoint gives, which all processes do together.

    Raises:
      BrokenCheckpoint: on all of them, where one could not read it. Each for itself, some would go on from this
        checkpoint and others from the one before.
    """
    result, problem = None, None
    try:
        result = read()
    except BrokenCheckpoint as err:
        problem = str(err)
    problems = [told for told in exchange.gather(problem) if told is not None]
    if problems:
        raise BrokenCheckpoint(problems[0])
    return result


def read_newest(path: Path, read: Callable[["Checkpoints", int], T]) -> T:
    """Returns read(checkpoints, step) of the newest readable checkpoint of a workdir, or of the one checkpoint `path`.

    Raises:
      UserError: `path` is neither, or nothing there can be read.
    """
    folder, step = (path / FOLDER, None) if (path / FOLDER).is_dir() else (path.parent, path.name)
    if step is not None and not (path.is_dir() and step.isdigit()):
        raise UserError(f"no checkpoint at {path}: it must be a workdir with {FOLDER}/ in it, or one {FOLDER}/STEP")
    with Checkpoints(folder, read_only=True) as checkpoints:
        steps = exchange.from_main(checkpoints.steps()) if step is None else [int(step)]
        problem = f"no checkpoint in {folder}"
        for candidate in reversed(steps):
            try:
                return agreed(functools.partial(read, checkpoints, candidate))
            except BrokenCheckpoint as err:
                problem = str(err)
                if candidate != steps[0]:
                    print(f"{problem}; trying the one before", file=sys.stderr)
    raise UserError(problem)


def load_config(path: Path) -> Config:
    """Returns the stage that wrote the newest checkpoint of a workdir, or the one checkpoint `path`."""
    return read_newest(path, lambda checkpoints, step: checkpoints.config(step))


def load_model(path: Path, mesh: Mesh) -> tuple[Config, vlm.VLM, Params, int]:
    """Loads a trained model for use.

    Args:
      path: a workdir, whose newest readable checkpoint is taken, or one checkpoint folder `checkpoints/STEP`.
      mesh: where the parameters go; need not be the one that they were trained on.

    Returns:
      The config of that stage, the model, its parameters, the step.

    Raises:
      UserError: there is no readable checkpoint at `path`.
    """

    def read(checkpoints: Checkpoints, step: int) -> tuple[Config, vlm.VLM, Params, int]:
        config = checkpoints.config(step)
        model = vlm.VLM(config.model)
        abstract = state.abstract_params(model, config, mesh)
        return config, model, checkpoints.restore_params(step, abstract), step

    return read_newest(path, read)


def _pytree_restore(abstract: Any, *, partial: bool = False) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)


def _quality(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Larger is better. Losses of two stages do not compare: a later stage always wins."""
    return metrics["stage"], -metrics["answer_loss"]


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]


@functools.cache
def _git_hash() -> str:
    """The commit of the code that runs, with "-dirty" where it was changed since; "unknown" outside a checkout.

    The launch scripts name it where there is no .git: in ALIGNVLM_COMMIT, or in the file COMMIT of an image or a host.
    """
    noted = Path(__file__).parents[2] / "COMMIT"
    if commit := os.environ.get("ALIGNVLM_COMMIT"):
        return commit
    if noted.is_file():
        return noted.read_text().strip()
    command = ["git", "-C", str(Path(__file__).parent), "--no-optional-locks"]
    command += ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
