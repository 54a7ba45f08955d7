"""Checkpoints of a run, orbax composites of state, data position and metadata: how they are saved,
kept and quarantined. With `checkpoint_files` and `checkpoint_reading` the only file that knows
orbax.

    workdir/checkpoints/STEP/{state, data, metadata, tokenizer, metrics, commit_success.txt}

STEP counts over all stages. It is whole when `commit_success.txt` stands in it, which is written
last. Where folders can be renamed, one appears under its final name only then. Nothing is deleted
but what is superseded or was not finished.
"""

import contextlib
import importlib.metadata
import itertools
import sys
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.data import prepared
from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.parallel import distributed, exchange
from alignvlm_jax.storage import Path
from alignvlm_jax.train import checkpoint_files, commit
from alignvlm_jax.train.checkpoint_files import is_step
from alignvlm_jax.train.checkpoint_reading import LAYOUT_VERSION, BrokenCheckpoint, Reader
from alignvlm_jax.train.state import TrainState

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
FOLDER = "checkpoints"
POLL_SECONDS = 0.05


class Checkpoints(Reader):
    """The checkpoints below one folder, written asynchronously.

    Kept: the newest `keep`, the one with the least validation loss of the newest stage, and those
    at `stage_ends`.
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
        """`host_gb` bounds what a save copies and writes at once, and makes its caller wait; it
        must hold any array."""
        checkpoint_files.quiet_terminal()
        super().__init__(folder, checkpoint_files.handlers(host_gb))
        if not read_only or storage.is_bucket(self.folder):
            storage.check_name(self.folder)
        # Of several processes one that only reads waits for no other: the manager would, at its
        # barriers.
        self._manager = None if read_only else self._make_manager(keep, stage_ends)
        self._saving: int | None = None
        self._failed = False
        self._problem: BaseException | None = None
        self._run_id: str | None = None
        self._unraisable_hook = sys.unraisablehook

    def _make_manager(self, keep: int, stage_ends: tuple[int, ...]) -> ocp.CheckpointManager:
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False)
        kept = policies.AnyPreservationPolicy(
            [policies.LatestN(keep), policies.CustomSteps(stage_ends), best]
        )
        renames = self._prepare()
        # Of a bucket orbax knows by itself that folders cannot be renamed, of a mount it does not.
        mode = "auto" if renames or storage.is_bucket(self.folder) else "commit_file"
        # Without a best_fn no metrics are written, and the policy would have nothing to compare
        # after a resume.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            best_fn=_quality,
            atomicity_options=ocp.options.AtomicityOptions(ocp.options.AtomicityMode(mode)),
        )
        manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=self._handlers)
        # Its own removes a checkpoint file by file: one that a kill left half removed would look
        # whole.
        manager._checkpoint_deleter = checkpoint_files.Deleter(self.folder, renames)
        # A thread of its own takes an error from where `check_for_errors` looks, and waits then for
        # other processes, which wait for this one's part.
        wait_for_writers = manager._wait_for_checkpointers

        def noting() -> None:
            try:
                wait_for_writers()
            except BaseException as err:
                self._problem = err
                raise

        manager._wait_for_checkpointers = noting
        return manager

    def __enter__(self) -> "Checkpoints":
        sys.unraisablehook = self._report_unraisable
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        try:
            # The second Ctrl-C means now: do not wait for a save.
            if kind is KeyboardInterrupt or self._manager is None:
                return
            # Of several processes the others wait for this one's part, at barriers where it would
            # wait for them: until it ends nobody tells them that there will be none.
            if self._failed and jax.process_count() > 1:
                return
            # An error on its way out is the one to report, not what it does to the save under way.
            with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                self.wait()
                self._manager.close()
        finally:
            sys.unraisablehook = self._unraisable_hook

    def _prepare(self) -> bool:
        """Makes the folder, clears what earlier runs did not finish, and returns whether its
        folders can be renamed."""
        renames = None
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            renames = storage.can_rename_folders(self.folder)
            for child in storage.children(self.folder):
                # A folder is no checkpoint until it is whole, so where it lies in place it may be
                # half of one.
                is_whole = is_step(child.name) and (child / checkpoint_files.COMMITTED).exists()
                if checkpoint_files.UNFINISHED in child.name or (
                    is_step(child.name) and not is_whole and not renames
                ):
                    storage.remove_tree(child)
                elif child.name.isdigit() and not is_whole:
                    # None of ours. Orbax would count it among those that are kept, and refuse to
                    # write that step.
                    aside = self._broken_name(child.name)
                    storage.move_folder(child, aside, last=checkpoint_files.COMMITTED)
                    print(
                        f"{child} is no whole checkpoint: moved to {aside}",
                        file=sys.stderr,
                        flush=True,
                    )
        return exchange.from_main(renames)

    def save(
        self,
        step: int,
        live: TrainState,
        *,
        position: Mapping[str, Any],
        metadata: Mapping[str, Any],
        metrics: Mapping | None,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> None:
        """Starts to write a checkpoint; `live` may be donated at once.

        Args:
          step: over all stages; must be new.
          live: the state.
          position: in the stage's data: `next_sequence`, the rows that all processes have trained
            on, and what else spares a resumed run work; for JSON.
          metadata: of `describe`.
          metrics: {"stage": index, "answer_loss": of validation at this very step}, or None without
            validation.
          tokenizer: its files by name, of `stage_data.tokenizer_files`, so that the checkpoint can
            be used where nothing else of the run is; None where they stand in the workdir.

        Raises:
          UserError: this save, or the one before, could not be written: TryAgainError where it may
            be the next time.
        """
        self.wait()
        self._saving = step
        storage.check_held(self.folder)
        try:
            # What was logged up to here is not to be lost when the run goes on from here.
            storage.sync_all()
        except OSError as err:
            raise self._save_error(err) from err
        self._check_space(live)
        objects = {
            "data": dict(position),
            "metadata": {
                **metadata,
                # Without one in the metadata earlier checkpoints are read for it.
                "run_id": metadata.get("run_id") or self._id_of_run(),
                "step": step,
            },
        }
        if tokenizer is not None:
            # Named, so that one that gets lost on the way is missed.
            objects["metadata"]["tokenizer"] = sorted(tokenizer)
            objects["tokenizer"] = checkpoint_files.packed(tokenizer)
        items = {
            name: ocp.args.JsonSave(checkpoint_files.with_checksum(fields))
            for name, fields in objects.items()
        }
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(live), **items)
        try:
            written = self._manager.save(step, args=args, metrics=metrics)
        except Exception as err:
            raise self._save_error(err) from err
        if not written:
            raise UserError(
                f"checkpoint {self.folder / str(step)} was not written: the step exists already"
            )

    def check(self) -> None:
        """Raises UserError if a save under way has failed, or the workdir is no longer ours; does
        not wait."""
        storage.check_held(self.folder)
        if self._problem:
            raise self._save_error(self._problem) from self._problem

    def wait(self) -> None:
        """Waits until the last save is whole; UserError if it failed."""
        while jax.process_count() > 1 and self._manager.is_saving_in_progress():
            if self._problem:
                raise self._save_error(self._problem) from self._problem
            time.sleep(POLL_SECONDS)
        try:
            self._manager.wait_until_finished()
        except Exception as err:
            raise self._save_error(err) from err

    def quarantine(self, step: int) -> Path:
        """Moves a broken checkpoint, so that its step can be written again, to STEP.broken, or to
        STEP.broken.N where that is taken; returns the new path. All of its files stay: where
        folders cannot be renamed they are copied first."""
        broken = self._broken_name(str(step))
        if distributed.is_main():
            storage.move_folder(self.folder / str(step), broken, last=checkpoint_files.COMMITTED)
        exchange.barrier()
        self._manager.reload()
        return broken

    def _broken_name(self, name: str) -> Path:
        """A free name for what is moved out of the way."""
        names = (
            f"{name}.broken{number}"
            for number in itertools.chain([""], (f".{n}" for n in itertools.count(2)))
        )
        return next(self.folder / free for free in names if not (self.folder / free).exists())

    def _id_of_run(self) -> str:
        """Returns what tells this run from others, over all its resumes."""
        for step in [] if self._run_id else reversed(self.steps()):
            with contextlib.suppress(BrokenCheckpoint, UserError):
                self._run_id = self._run_id or self.metadata(step).get("run_id")
        self._run_id = self._run_id or uuid.uuid4().hex
        return self._run_id

    def _report_unraisable(self, problem: "sys.UnraisableHookArgs") -> None:
        """When one array cannot be written or read, orbax closes its event loop under the others;
        each complains."""
        if not str(problem.exc_value).startswith(
            ("Event loop is closed", "Encountered error while reading array")
        ):
            self._unraisable_hook(problem)

    def _check_space(self, live: TrainState) -> None:
        """Told before half of it is written; an array takes at most a block more than its size, for
        its metadata."""
        needed = sum(array.nbytes + 4096 for array in jax.tree.leaves(live))
        free = storage.free_bytes(self.folder)
        if free is not None and needed > free:
            reason = f"it takes {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
            raise self._save_error(OSError(reason), may_pass=False)

    def _save_error(self, err: Exception, may_pass: bool | None = None) -> UserError:
        """The failed step is told from those that stand; orbax's message may run over many
        lines."""
        self._failed = True
        if may_pass is None:
            may_pass = checkpoint_files.may_pass(err)
        error = TryAgainError if may_pass else UserError
        # What cannot be written can often not be listed either: the first error is the one to
        # report.
        try:
            self._manager.reload()
            whole = self.latest()
        except Exception:
            return error(
                f"could not write checkpoint {self.folder / str(self._saving)}: "
                f"{checkpoint_files.first_line(err)}; which earlier ones stand cannot be seen now"
            )
        rest = "there is no earlier one" if whole is None else f"step {whole} stands"
        return error(
            f"could not write checkpoint {self.folder / str(self._saving)}: "
            f"{checkpoint_files.first_line(err)}; {rest}"
        )


def describe(
    stages: tuple[Config, ...], stage: Config, *, train_seconds: float, answer_loss: float | None
) -> dict[str, Any]:
    """Returns a checkpoint's metadata: all that is needed to use it without its workdir, and where
    it came from."""
    return ({"run_id": stage.run_id} if stage.run_id else {}) | {
        "layout_version": LAYOUT_VERSION,
        "config": config_lib.to_json(stages),
        "stage": stage.stage,
        "data": prepared.fingerprint(*stage.data.folders),
        "prepared": [prepared.description(folder) for folder in stage.data.folders],
        "train_seconds": train_seconds,
        "validation_answer_loss": answer_loss,
        "git": commit.git_hash(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _quality(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Larger is better. Losses of two stages do not compare: a later stage always wins."""
    return metrics["stage"], -metrics["answer_loss"]
