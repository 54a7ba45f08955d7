"""The order of operations of a run: its stages, and within a stage data, step, metrics, validation, checkpoint.

A stage always starts from a saved checkpoint, that of the stage before or its own: a run that was stopped and one that
was not take the same path.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.data import pipeline, sources
from alignvlm_jax.errors import UserError
from alignvlm_jax.eval import spot_check
from alignvlm_jax.eval.spot_check import SpotCheck
from alignvlm_jax.logs import HostLog
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import distributed, exchange, sharding
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import (
    checkpoint,
    commit,
    flops,
    goodput,
    hooks,
    optim,
    preflight,
    state,
    step,
    warm_start,
    watch,
    workdir,
)
from alignvlm_jax.train.checkpoint import BrokenCheckpoint, Checkpoints
from alignvlm_jax.train.goodput import Phases
from alignvlm_jax.train.heartbeat import Heartbeat
from alignvlm_jax.train.hooks import Profiler
from alignvlm_jax.train.metrics import FILE as METRICS_FILE
from alignvlm_jax.train.metrics import Interval, NullWriter, Progress, Writer, peak_memory_gib
from alignvlm_jax.train.signals import StopSignal
from alignvlm_jax.train.state import TrainState
from alignvlm_jax.train.validation import Validation

SLOW_STEP_SECONDS = 1.0
"""Beyond it a device that waits a millisecond for its next step loses nothing worth having."""


class Stopped(UserError):
    """The run was told to stop, and has saved."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, and the steps, counted over the run, between which it lies."""

    index: int
    config: Config
    begin: int
    end: int


@dataclasses.dataclass
class Run:
    """What all stages of a run share."""

    stages: tuple[Config, ...]
    total: int
    folder: Path
    checkpoints: Checkpoints
    progress: Progress
    stop: StopSignal
    phases: Phases
    heartbeat: Heartbeat
    profiler: Profiler
    began: float
    earlier_seconds: float | None = None
    announced: bool = False
    broken: tuple[int, BrokenCheckpoint] | None = None

    def newest(self) -> int:
        """The newest step whose checkpoint is not known to be broken; 0 without one."""
        return max((step for step in self.checkpoints.steps() if not self.broken or step != self.broken[0]), default=0)

    def train_seconds(self) -> float:
        """Seconds of training over stages and resumes: everything that the user waits for."""
        return (self.earlier_seconds or 0.0) + time.monotonic() - self.began


def train(configs: tuple[Config, ...], folder: Path, console: Console, process_began: float | None = None) -> None:
    """Trains the stages in order in the workdir `folder`, going on from its newest readable checkpoint.

    `process_began` is when the process began, on the clock of `time.monotonic`; default: now.

    Raises:
      Stopped: after SIGINT or SIGTERM; the state is saved.
      UserError: the workdir belongs to another config, something cannot be read or written, or too many steps were
        skipped.
    """
    began = time.monotonic()
    # Before anything else: from here on processes wait for each other.
    distributed.check_alike(dict(workdir.leaves(configs)))
    preflight.check(configs)
    distributed.check_alike(
        {f"the data of stage {one.stage}": sources.fingerprint(*one.data.folders) for one in configs}
    )
    spot_check.check(configs)
    stages = lay_out(configs)
    total = stages[-1].end
    profiled = hooks.profile_range(configs)
    process, num_processes = jax.process_index(), jax.process_count()
    keep, ends = max(config.train.keep_checkpoints for config in configs), tuple(stage.end for stage in stages)
    with (
        workdir.claim(folder, configs),
        HostLog(folder, process=process, num_processes=num_processes, commit=commit.git_hash()) as log,
        Phases(process_began) as phases,
        watch.watched(
            folder,
            phases,
            process=process,
            num_processes=num_processes,
            total=total,
            stall_minutes=watch.stall_minutes(configs),
            log=log.file,
            stopped=(Stopped,),
        ) as heartbeat,
        StopSignal() as stop,
        Checkpoints(folder / checkpoint.FOLDER, keep=keep, stage_ends=ends) as checkpoints,
        Progress(console, total) as progress,
        Profiler(folder, profiled, process, progress.say) as profiler,
    ):
        run = Run(configs, total, folder, checkpoints, progress, stop, phases, heartbeat, profiler, began)
        # What is listed may differ between hosts for a moment, as on a bucket: one of them says what is there.
        while (newest := exchange.from_main(run.newest())) < total:
            stage = next(stage for stage in stages if newest < stage.end)
            try:
                _train_stage(run, stage, newest)
            except BrokenCheckpoint as err:
                if run.broken:
                    # Two in a row are more likely the storage's fault, or ours, than two accidents.
                    raise UserError(f"{run.broken[1]}, and {err}; move them away to do without them") from err
                run.broken = newest, err
        progress.say(f"done: {total} steps, {checkpoints.folder / str(total)}")


def lay_out(configs: tuple[Config, ...]) -> list[Stage]:
    """Returns the stages with their step ranges."""
    begins = np.cumsum([0] + [config.train.num_steps for config in configs]).tolist()
    return [Stage(i, config, begins[i], begins[i + 1]) for i, config in enumerate(configs)]


def _train_stage(run: Run, stage: Stage, newest: int) -> None:
    """Trains the rest of a stage, from the checkpoint of step `newest`; 0 is no checkpoint."""
    config = stage.config
    model, tx = vlm.VLM(config.model), optim.make_optimizer(config)
    with mesh_lib.use(mesh_lib.make_mesh(config)) as mesh:
        # Read before anything is compiled: data that is missing should be told at once.
        validation = Validation(config, mesh)
        asker = SpotCheck(model, config, mesh) if spot_check.is_asked(config) else None
        abstract = state.abstract_state(model, config, tx, mesh)
        with run.phases.enter("restoring"):
            live, position = _start(run, stage, newest, model, tx, abstract)
        _set_broken_aside(run, newest)
        if not run.announced:
            _watch_from(run, newest)
        _announce(run, stage, newest, mesh, abstract)
        with Writer(run.folder, newest) if distributed.is_main() else NullWriter() as writer:
            with run.phases.enter("compiling"):
                train_step, eval_step = step.compile_steps(model, config, tx, abstract, mesh)
            mfu_of = flops.mfu_of(config, abstract.params, mesh.devices.flat)
            loop = _StageLoop(run, stage, mesh, writer, train_step, eval_step, validation, asker, mfu_of)
            loop.run_steps(live, newest, position)


def _start(
    run: Run, stage: Stage, newest: int, model: vlm.VLM, tx: optax.GradientTransformation, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to go on from, and the position in the stage's data."""
    config, checkpoints = stage.config, run.checkpoints
    if run.earlier_seconds is None:
        metadata = checkpoint.agreed(lambda: checkpoints.metadata(newest)) if newest else {"train_seconds": 0.0}
        _check_data(run, metadata)
        run.earlier_seconds = metadata["train_seconds"]
    if newest > stage.begin:
        run.progress.say(f"going on from {checkpoints.folder / str(newest)}")
        return checkpoint.agreed(lambda: checkpoints.restore(newest, abstract))

    def read(source: Checkpoints, source_step: int) -> warm_start.Found:
        return warm_start.read(config, abstract, source, source_step)

    found = None
    if newest:
        found = checkpoint.agreed(lambda: read(checkpoints, newest))
    elif config.init_from:
        found = checkpoint.read_newest(storage.path(config.init_from), read)
    rng = jax.random.fold_in(jax.random.key(config.seed), stage.index)
    params, table = warm_start.start_params(model, config, abstract, found, rng)
    run.progress.say(table)
    opt_state = state.init_opt_state(tx, config, abstract, params)
    first = jax.device_put(np.asarray(stage.begin, np.int32), abstract.step.sharding)
    return TrainState(first, params, opt_state), {"next_row": 0}


def _check_data(run: Run, metadata: Mapping[str, Any]) -> None:
    """The position in the data means nothing in other data."""
    if "data" not in metadata:  # Without a checkpoint, or with one from before data had fingerprints.
        return
    folders = next(config.data.folders for config in run.stages if config.stage == metadata["stage"])
    here = sources.fingerprint(*folders)
    if not sources.has_fingerprint(metadata["data"], *folders):
        raise UserError(
            f"{run.folder} was trained on data of fingerprint {metadata['data']}, "
            f"that of {', '.join(folders)} is {here}; "
            "take the data that it was trained on, or another --workdir"
        )


def _set_broken_aside(run: Run, newest: int) -> None:
    """Only once the one before has been read: until then nothing is changed."""
    if run.broken:
        (step, err), run.broken = run.broken, None
        run.progress.say(f"{err}; moved to {run.checkpoints.set_aside(step)}, going on from step {newest}")


def _watch_from(run: Run, newest: int) -> None:
    """Goes on with the sums of where time went, before the lines beyond `newest` are cut off."""
    carried = goodput.carried(goodput.logged(run.folder / METRICS_FILE), newest)
    before = run.heartbeat.earlier.get("run_seconds", 0.0)
    if newest or before:
        run.phases.resume(newest, carried, before)
    run.profiler.resume(newest)


def _announce(run: Run, stage: Stage, newest: int, mesh: Mesh, abstract: TrainState) -> None:
    """Says what is about to be trained, and once a run on what."""
    sizes = {path: math.prod(x.shape) for path, x in state.flatten(abstract.params).items()}
    if not run.announced:
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        run.progress.say(f"mesh: {axes}\n{sharding.table(abstract.params, state.shardings_of(abstract.params))}")
        run.announced = True
    trained = sum(sizes[path] for path in state.trainable_paths(stage.config, abstract.params))
    run.progress.say(
        f"stage {stage.config.stage!r}: steps {newest + 1} to {stage.end}, "
        f"trains {trained:,} of {sum(sizes.values()):,} parameters; compiling"
    )


@dataclasses.dataclass
class _StageLoop:
    """The steps of one stage. Metrics of a step are read once the next step has been sent off, or is about to be."""

    run: Run
    stage: Stage
    mesh: Mesh
    writer: Writer | NullWriter
    train_step: step.TrainStep
    eval_step: step.EvalStep
    validation: Validation
    spot_check: SpotCheck | None
    mfu_of: Callable[[float], dict[str, float]]
    interval: Interval = dataclasses.field(default_factory=Interval)
    batches: pipeline.TrainBatches = dataclasses.field(init=False)
    unread: tuple[int, step.Metrics, int] | None = None  # the last, batches.num_unsupervised
    unsupervised_read: int = 0
    unsupervised_told: int = 0
    last_read: float | None = None
    step_seconds: float = 0.0
    saved: int = 0
    saved_at: float = 0.0

    def run_steps(self, live: TrainState, newest: int, position: Mapping[str, Any]) -> None:
        """Trains from step `newest` to the stage's end, where a checkpoint stands in any case."""
        config = self.stage.config
        self.saved, self.saved_at = newest, time.monotonic()
        local_rows = sharding.rows_of_process(self.mesh, config.train.batch_size).tolist()
        self.batches = pipeline.TrainBatches(
            config,
            start_row=position["next_row"],
            local_rows=local_rows,
            schedule_state=position.get("schedule"),
        )
        if self.batches.num_unused:
            self.run.progress.say(f"{self.batches.num_unused:,} records are in no row: of no use to the stage's tasks")
        self.interval = Interval(position.get("interval", ()))
        self.unsupervised_told = -position.get("unsupervised_records", 0)
        with self.run.phases.enter("training"):
            self._run_steps(live, newest)
        # The next stage would compile before it asks.
        if self.stage.end < self.run.total and self.run.stop.requested():
            raise self._stopped(self.stage.end)

    def _run_steps(self, live: TrainState, newest: int) -> None:
        config = self.stage.config
        for now in range(newest + 1, self.stage.end + 1):
            batch = self._next_batch()
            if self.step_seconds > SLOW_STEP_SECONDS:
                # So that no step is sent off that a stop would have to wait for.
                self._read()
            must_stop, must_save = self._decide()
            if must_stop:
                self._stop(live, now - 1)
            if must_save and now - 1 > self.saved:
                self._save(live, now - 1, None)
            with jax.transfer_guard("disallow"), self.run.profiler.step(now, self._wait_for_step):
                live, metrics = self.train_step(live, batch)
            self._read()
            self.unread = now, metrics, self.batches.num_unsupervised
            self.run.profiler.after_step(now, self._wait_for_step)
            self.run.checkpoints.check()
            answer_loss = self._validate(live, now) if self._is_due(now, config.train.validate_every) else None
            if self.spot_check and self._is_due(now, config.train.generate_every):
                self._ask(live, now)
            if self._is_due(now, config.train.checkpoint_every):
                self._save(live, now, answer_loss)
        self._wait_for_save()

    def _next_batch(self) -> dict[str, jax.Array]:
        """The next batch on the devices, while the step before is at work on them: what the host waits for meanwhile
        counts as training."""
        phases, began = self.run.phases, time.monotonic()
        with phases.enter("waiting"):
            batch = self.interval.next_batch(self.batches, self._is_device_busy)
        if self._is_device_busy():
            phases.move("waiting", "training", time.monotonic() - began)
        with jax.transfer_guard("disallow"):
            return sharding.put_batch(step.train_inputs(self.stage.config, batch), self.mesh)

    def _wait_for_step(self) -> None:
        jax.block_until_ready(self.unread and self.unread[1])

    def _wait_for_save(self) -> None:
        with self.run.phases.enter("saving"):
            self.run.checkpoints.wait()

    def _should_stop(self) -> bool:
        """Asked between the batches of validation and generation."""
        self.run.phases.progress()
        return self.run.stop.requested()

    def _decide(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save for the time that has passed: the same on all processes."""
        minutes = self.stage.config.train.checkpoint_minutes
        is_late = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        return tuple(exchange.from_main((self.run.stop.seen(), is_late)))

    def _stop(self, live: TrainState, now: int) -> None:
        self._read()
        self.run.progress.say(f"stopping at step {now}")
        if now > self.saved:
            self._save(live, now, None)
        self._wait_for_save()
        raise self._stopped(now)

    def _stopped(self, now: int) -> Stopped:
        return Stopped(f"stopped at step {now} of {self.run.total}")

    def _is_due(self, now: int, every: int) -> bool:
        return (now - self.stage.begin) % every == 0 or now == self.stage.end

    def _is_device_busy(self) -> bool:
        """Whether a step that was sent off is not finished yet."""
        return self.unread is not None and not self.unread[1]["loss"].is_ready()

    def _read(self) -> None:
        """Reads the metrics of the step before, waiting for it, and logs them where due."""
        if self.unread is None:
            return
        (now, metrics, self.unsupervised_read), self.unread = self.unread, None
        config = self.stage.config
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        began, self.last_read = self.last_read, time.monotonic()
        if began is not None:
            self.step_seconds = self.last_read - began
        self.run.phases.step(now)
        skipped = now - self.stage.begin - int(values.pop("num_updates"))
        if skipped > config.train.max_skipped_steps:
            raise UserError(
                f"{skipped} steps of stage {config.stage!r} had no finite gradient, the last of them step {now}; "
                f"config.train.max_skipped_steps is {config.train.max_skipped_steps}: lower "
                f"config.optim.learning_rate {config.optim.learning_rate}"
            )
        self.interval.add(values)
        if self._is_due(now, config.train.log_every):
            line = self.interval.means() | {"learning_rate": values["learning_rate"]}
            line |= {"train_seconds": self.run.train_seconds(), "skipped_steps": skipped}
            line |= self.mfu_of(line["steps_per_second"])
            # Of the rows up to this step: those of the next have been read already.
            line |= self.batches.counters((now - self.stage.begin) * config.train.batch_size)
            # Not known from the plan, so of this process alone, and since the line before: lines add up after a resume.
            line["unsupervised_records"] = self.unsupervised_read - self.unsupervised_told
            self.unsupervised_told = self.unsupervised_read
            line["peak_memory_gib"] = peak_memory_gib()
            line |= self.run.phases.metrics()
            self.interval = Interval()
            self.writer.write(now, config.stage, line)
            self.run.progress.update(now, config.stage, line)

    def _validate(self, live: TrainState, now: int) -> float | None:
        """Measures and logs the validation losses; returns the answer loss, or None where there is none or when
        told to stop meanwhile."""
        self._read()
        with self.interval.pause(), self.run.phases.enter("validating"):
            values = self.validation.measure(self.eval_step, live.params, self._should_stop)
            if values is None:
                self.run.progress.say(f"no validation at step {now}: the run is told to stop")
                return None
            self.writer.write(now, self.stage.config.stage, values | self.run.phases.metrics())
            return values.get("validation/answer_loss")

    def _ask(self, live: TrainState, now: int) -> None:
        """Logs the scores of generated answers; nothing when told to stop meanwhile."""
        self._read()
        with self.interval.pause(), self.run.phases.enter("generating"):
            if values := self.spot_check.scores(live.params, self._should_stop):
                self.writer.write(now, self.stage.config.stage, values | self.run.phases.metrics())
            else:
                self.run.progress.say(f"no generated answers at step {now}: the run is told to stop")

    def _save(self, live: TrainState, now: int, answer_loss: float | None) -> None:
        self._read()
        with self.interval.pause(), self.run.phases.enter("saving"):
            seconds = self.run.train_seconds()
            metadata = checkpoint.describe(
                self.run.stages, self.stage.config, train_seconds=seconds, answer_loss=answer_loss
            )
            is_comparable = answer_loss is not None and math.isfinite(answer_loss)
            metrics = {"stage": self.stage.index, "answer_loss": answer_loss} if is_comparable else None
            # Not of the batches: one more than was trained on may have been fetched.
            next_row = (now - self.stage.begin) * self.stage.config.train.batch_size
            position = {
                "next_row": next_row,
                "schedule": self.batches.schedule_state(),
                # Since the last line, of which the next one tells too.
                "interval": list(self.interval.values),  # It is written while further steps are added.
                "unsupervised_records": self.unsupervised_read - self.unsupervised_told,
            }
            self.run.checkpoints.save(now, live, position=position, metadata=metadata, metrics=metrics)
            self.saved, self.saved_at = now, time.monotonic()
