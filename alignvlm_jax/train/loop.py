"""The order of operations of a run: what is checked first, its stages, and within a stage what it
starts from.

A stage always starts from a saved checkpoint, that of the stage before or its own: a run that was
stopped and one that was not take the same path.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from alignvlm_jax import storage
from alignvlm_jax.config import Config
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError
from alignvlm_jax.logs import HostLog
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import distributed, exchange, sharding
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import flops
from alignvlm_jax.train import (
    checkpoint,
    commit,
    goodput,
    hooks,
    metrics,
    optim,
    preflight,
    restore,
    state,
    step,
    warm_start,
    watch,
    workdir,
)
from alignvlm_jax.train.checkpoint import BrokenCheckpoint, Checkpoints
from alignvlm_jax.train.evaluator import Kind
from alignvlm_jax.train.goodput import Phases
from alignvlm_jax.train.hooks import Profiler, StopSignal
from alignvlm_jax.train.metrics import FILE as METRICS_FILE
from alignvlm_jax.train.metrics import NullWriter, Progress, Writer
from alignvlm_jax.train.run import Run, Stage, Stopped
from alignvlm_jax.train.stage_loop import StageLoop
from alignvlm_jax.train.state import TrainState


def train(
    configs: tuple[Config, ...],
    folder: Path,
    console: Console,
    kinds: tuple[Kind, ...],
    process_began: float | None = None,
    config_flags: Sequence[str] = (),
) -> None:
    """Trains the stages in order in the workdir `folder`, going on from its newest readable
    checkpoint.

    Args:
      configs: the stages.
      folder: the workdir.
      console: where progress is shown.
      kinds: of evaluators, in the order in which those that are due at a step run.
      process_began: on the clock of `time.monotonic`; default: now.
      config_flags: the command's flags that make `configs`, for the checkpoints to tell.

    Raises:
      Stopped: after SIGINT or SIGTERM; the state is saved.
      UserError: the workdir belongs to another config, something cannot be read or written, or too
        many steps were skipped.
    """
    began = time.monotonic()
    # Before anything else: from here on processes wait for each other.
    distributed.check_alike(dict(workdir.leaves(configs)))
    distributed.check_alike(preflight.files_of(configs))
    opened = dict(enumerate(preflight.open_stages(configs)))
    for kind, index in itertools.product(kinds, opened):
        kind.check(configs[index], opened[index])
    beside = {"kinds": kinds, "began": began, "opened": opened, "config_flags": config_flags}
    with _opened_run(configs, folder, console, process_began, beside) as run:
        _check_newest(run.checkpoints, run.total)
        stages = lay_out(run.stages)
        more = "; nothing was left to do: another --workdir trains anew"
        # What is listed may differ between hosts for a moment, as on a bucket: one of them says
        # what is there.
        while found := exchange.from_main(_next(run, stages) if distributed.is_main() else None):
            index, newest, lacking = found
            more = ""
            try:
                _train_stage(run, stages[index], newest, lacking)
            except BrokenCheckpoint as err:
                if run.broken:
                    # Two in a row are more likely the storage's fault, or ours, than two accidents.
                    raise UserError(
                        f"{run.broken[1]}, and {err}; move them away to do without them"
                    ) from err
                run.broken = newest, err
        run.progress.say(
            f"done: {run.total} steps, {run.checkpoints.folder / str(run.total)}{more}"
        )


@contextlib.contextmanager
def _opened_run(
    configs: tuple[Config, ...],
    folder: Path,
    console: Console,
    process_began: float | None,
    beside: Mapping[str, Any],
) -> Iterator[Run]:
    """Locks the workdir, opens what a run has open from its first step to its last, and gives the
    run; `beside` are its other fields."""
    stages = lay_out(configs)
    total = stages[-1].end
    profiled = hooks.profile_range(configs)
    process = jax.process_index()
    num_processes = jax.process_count()
    # One manager keeps the checkpoints of all stages, in one folder.
    keep = max(config.train.keep_checkpoints for config in configs)
    ends = tuple(stage.end for stage in stages)
    with (
        # Left in reverse order: the lock goes last, when neither save nor log line is under way.
        workdir.lock(folder, configs) as identified,
        HostLog(
            folder, process=process, num_processes=num_processes, commit=commit.git_hash()
        ) as log,
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
        Progress(console, total) as progress,
        StopSignal(progress.say) as stop,
        Checkpoints(folder / checkpoint.FOLDER, keep=keep, stage_ends=ends) as checkpoints,
        Profiler(folder, profiled, process, progress.say) as profiler,
    ):
        yield Run(
            stages=identified,
            total=total,
            folder=folder,
            checkpoints=checkpoints,
            progress=progress,
            stop=stop,
            phases=phases,
            heartbeat=heartbeat,
            profiler=profiler,
            **beside,
        )


def _check_newest(checkpoints: Checkpoints, total: int) -> None:
    """Checks the newest checkpoint, also where nothing is left to do: a folder that has been given
    another name is not what it says.

    Raises:
      UserError: it is beyond the run's last step, or its metadata name another step.
    """
    newest = exchange.from_main(checkpoints.latest())
    if newest is None:
        return
    if newest > total:
        raise UserError(
            f"{checkpoints.folder} holds a checkpoint of step {newest}, and this run ends at step "
            f"{total}: it is another run's, or was renamed; move it away"
        )
    with contextlib.suppress(BrokenCheckpoint):  # For the loop to quarantine.
        restore.agreed_metadata(checkpoints, newest)


def _next(run: Run, stages: Sequence[Stage]) -> tuple[int, int, list[str]] | None:
    """Returns the index of the stage to go on with, the step of the newest checkpoint, and the
    evaluations that this step lacks; None when all is done."""
    newest = run.newest()
    for stage in stages:
        # A stage is done with its last checkpoint, unless a stop kept evaluations of that step out.
        lacking = run.lacking(stage, newest) if stage.begin < newest <= stage.end else []
        if newest < stage.end or lacking:
            return stage.index, newest, lacking
    return None


def lay_out(configs: tuple[Config, ...]) -> list[Stage]:
    """Returns the stages with their step ranges."""
    # Of stages with 100 and 50 steps: [0, 100, 150].
    begins = np.cumsum([0] + [config.train.num_steps for config in configs]).tolist()
    return [Stage(i, config, begins[i], begins[i + 1]) for i, config in enumerate(configs)]


def _train_stage(run: Run, stage: Stage, newest: int, lacking: Sequence[str]) -> None:
    """Trains the rest of a stage, from the checkpoint of step `newest`, of which evaluations may be
    lacking; 0 is no checkpoint."""
    config = stage.config
    model = vlm.VLM(config.model)
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    with mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, config.train)) as mesh:
        # Taken out of the run, so that it goes with the stage: a run of many stages must not hold
        # the data of all to its end. A stage that begins again after a broken checkpoint opens its
        # data again.
        for done in [index for index in run.opened if index < stage.index]:
            del run.opened[done]
        opened = run.opened.pop(stage.index, None) or StageData.open(config.data, config.model)
        # Read before anything is compiled: data that is missing should be told at once.
        evaluators = {
            kind.name: kind.open(model, config, mesh, opened)
            for kind in run.kinds
            if kind.every(config)
        }
        abstract = state.abstract_state(model, config.train, tx, mesh, config.lora)
        with run.phases.enter("restoring"):
            live, position = _start(run, stage, opened, newest, model, tx, abstract)
        _quarantine_broken(run, newest)
        if not run.announced:
            _watch_from(run, stage, newest)
        _announce(run, stage, newest, mesh, abstract)
        with (
            Writer(run.folder, newest, config.run_id)
            if distributed.is_main()
            else NullWriter() as writer
        ):
            began = time.monotonic()
            # What is shown till now is of the stage before.
            busy = run.progress.busy(newest, config.stage, "compiling", False)
            with run.phases.enter("compiling"), busy:
                train_step, eval_step = step.compile_steps(model, config, tx, abstract, mesh)
            if config.train.jit:
                seconds = time.monotonic() - began
                run.progress.say(f"compiled in {goodput.duration(seconds)}")
            # Counted once a stage, from shapes: of the plain program and not of the one just
            # compiled.
            mfu_of = flops.mfu_of(config, abstract.params, mesh.devices.flat)
            loop = StageLoop(
                run=run,
                stage=stage,
                mesh=mesh,
                opened=opened,
                writer=writer,
                train_step=train_step,
                eval_step=eval_step,
                evaluators=evaluators,
                mfu_of=mfu_of,
            )
            loop.run_steps(live, newest, position, lacking)


def _start(
    run: Run,
    stage: Stage,
    opened: StageData,
    newest: int,
    model: vlm.VLM,
    tx: optax.GradientTransformation,
    abstract: TrainState,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state to go on from, and the position in the stage's data."""
    config = stage.config
    checkpoints = run.checkpoints
    # Once a run: the checkpoints that later stages start from are of this very process.
    if run.earlier_seconds is None:
        metadata = (
            restore.agreed_metadata(checkpoints, newest) if newest else {"train_seconds": 0.0}
        )
        restore.check_data(run.folder, run.stages, metadata)
        restore.check_chat(run.folder, opened.tokenizer.chat_files, metadata)
        run.earlier_seconds = metadata["train_seconds"]
    if newest > stage.begin:
        run.progress.say(f"going on from {checkpoints.folder / str(newest)}")
        return restore.agreed(lambda: checkpoints.restore(newest, abstract))

    def read(source: Checkpoints, source_step: int) -> warm_start.Found:
        return warm_start.read(config.train, abstract, source, source_step, config.lora)

    found = None
    if newest:
        found = restore.agreed(lambda: read(checkpoints, newest))
    elif config.init_from:
        found = restore.read_newest(storage.path(config.init_from), read)
    # A function of seed and stage: a stage that is begun again draws the same parameters.
    rng = jax.random.fold_in(jax.random.key(config.seed), stage.index)
    params, table = warm_start.start_params(model, abstract, found, rng)
    run.progress.say(table)
    trainable = state.trainable_paths(config.train, config.stage, abstract.params)
    opt_state = state.init_opt_state(tx, trainable, abstract, params)
    # The compiled step takes no other dtype or sharding than those of `abstract`.
    first = jax.device_put(np.asarray(stage.begin, np.int32), abstract.step.sharding)
    return TrainState(first, params, opt_state), {"next_sequence": 0}


def _quarantine_broken(run: Run, newest: int) -> None:
    """Moves a checkpoint that could not be read away, and says so; only once the one before it has
    been read, until when nothing is changed."""
    if run.broken:
        (step, err) = run.broken
        run.broken = None
        run.progress.say(
            f"{err}; moved to {run.checkpoints.quarantine(step)}, going on from step {newest}"
        )


def _watch_from(run: Run, stage: Stage, newest: int) -> None:
    """Goes on with the sums of where time went, before the lines beyond `newest` are cut off."""
    _say_what_is_lost(run, stage, newest)
    carried = goodput.carried(goodput.logged(run.folder / METRICS_FILE), newest)
    before = run.heartbeat.earlier.get("run_seconds", 0.0)
    if newest or before:
        run.phases.resume(newest, carried, before)
    run.profiler.resume(newest)


def _say_what_is_lost(run: Run, stage: Stage, newest: int) -> None:
    """Says where lines of the log before the newest checkpoint are lost: a save waits until they
    are safe, so that somebody has removed them."""
    if not distributed.is_main():
        return  # Of a bucket every host would read it, for one line.
    done = newest - stage.begin
    every = stage.config.train.log_every
    # The newest step at which a line was due: `every` steps apart from `begin` on, and at the end.
    logged = newest if newest in (stage.begin, stage.end) else stage.begin + done // every * every
    last = metrics.last_step(run.folder / METRICS_FILE)
    if last < logged:
        run.progress.say(
            f"{run.folder / METRICS_FILE} ends at step {last}, and the newest checkpoint is of "
            f"step {newest}: what was logged between them is lost"
        )


def _announce(run: Run, stage: Stage, newest: int, mesh: Mesh, abstract: TrainState) -> None:
    """Says what is about to be trained, and once a run on what."""
    sizes = {path: math.prod(x.shape) for path, x in state.flatten(abstract.params).items()}
    if not run.announced:
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        # Of one device the table would say of each parameter that it is whole.
        shardings = state.shardings_of(abstract.params)
        table = f"\n{sharding.table(abstract.params, shardings)}" if mesh.size > 1 else ""
        run.progress.say(f"mesh: {axes}{table}")
        run.announced = True
    config = stage.config
    trainable = state.trainable_paths(config.train, config.stage, abstract.params)
    trained = sum(sizes[path] for path in trainable)
    what = (
        f"steps {newest + 1} to {stage.end}"
        if newest < stage.end
        else f"what a stop left out at step {newest}"
    )
    run.progress.say(
        f"stage {config.stage!r}: {what}, trains {trained:,} of {sum(sizes.values()):,} "
        f"parameters{'; compiling' if config.train.jit else ''}"
    )
