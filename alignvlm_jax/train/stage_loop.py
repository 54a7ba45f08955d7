"""The steps of one stage: data, step, metrics, validation, generation, checkpoint."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alignvlm_jax.data import loader
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError
from alignvlm_jax.parallel import exchange, sharding
from alignvlm_jax.train import checkpoint, goodput, lora, step
from alignvlm_jax.train.evaluator import Evaluator
from alignvlm_jax.train.metrics import Interval, NullWriter, Writer, peak_memory_gib
from alignvlm_jax.train.run import Run, Stage, Stopped
from alignvlm_jax.train.state import TrainState

SLOW_STEP_SECONDS = 1.0
"""Beyond it a device that waits a millisecond for its next step loses nothing worth having."""


class Sent(NamedTuple):
    """A step that was sent off: its metrics, which may not be there yet, and how many records of
    the stage had nothing to teach by then."""

    step: int
    metrics: step.Metrics
    num_unsupervised: int


@dataclasses.dataclass(kw_only=True)
class StageLoop:
    """The steps of one stage.

    Metrics of a step are read once the next step has been sent off, or is about to be.
    """

    run: Run
    stage: Stage
    mesh: Mesh
    opened: StageData
    writer: Writer | NullWriter
    train_step: step.TrainStep
    eval_step: step.EvalStep
    evaluators: Mapping[str, Evaluator]
    mfu_of: Callable[[float, Sequence[tuple[float, float]]], dict[str, float]]
    interval: Interval = dataclasses.field(default_factory=Interval)
    batches: loader.TrainBatches = dataclasses.field(init=False)
    unread: Sent | None = None
    used: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # of batches
    unsupervised_read: int = 0
    unsupervised_told: int = 0
    last_read: float | None = None
    step_seconds: float = 0.0
    saved: int = 0
    saved_at: float = 0.0
    was_cut_short: bool = False  # an evaluation, by a stop
    is_sample_told: bool = False  # that it has no room for all labels

    def run_steps(
        self,
        live: TrainState,
        newest: int,
        position: Mapping[str, Any],
        lacking: Sequence[str] = (),
    ) -> None:
        """Trains from step `newest` to the stage's end, where a checkpoint stands in any case;
        before that does the evaluations of step `newest` that a stop left out."""
        self.saved = newest
        self.saved_at = time.monotonic()
        self.run.progress.course = self._course()
        self._evaluate(live, newest, lacking)
        if newest < self.stage.end:
            self._open_batches(position)
            with self.run.phases.enter("training"):
                self._run_steps(live, newest)
        # The next stage would compile before it asks.
        if (self.stage.end < self.run.total or self.was_cut_short) and self.run.stop.requested():
            raise self._stopped(self.stage.end)

    def _course(self) -> goodput.Course:
        config = self.stage.config
        every = {kind.phase: kind.every(config) for kind in self.run.kinds}
        every["saving"] = config.train.checkpoint_every
        then = [stage.stage for stage in self.run.stages[self.stage.index + 1 :]]
        return goodput.Course(self.stage.begin, self.stage.end, every, then)

    def _open_batches(self, position: Mapping[str, Any]) -> None:
        config = self.stage.config
        local_rows = sharding.rows_of_process(self.mesh, config.train.batch_size).tolist()
        self.batches = loader.TrainBatches(
            config,
            start_sequence=position["next_sequence"],
            local_rows=local_rows,
            schedule_state=position.get("schedule"),
            opened=self.opened,
        )
        if self.batches.num_unused:
            self.run.progress.say(
                f"{self.batches.num_unused:,} records are in no row: of no use to the stage's tasks"
            )
        self.interval = Interval(position.get("interval", ()))
        # Below 0 by those that a stopped run had read and not told: the next line has them in it.
        self.unsupervised_told = -position.get("unsupervised_records", 0)

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
            # The old state is donated and gone after the call: nothing else may hold on to it. A
            # transfer that nobody asked for, and that may wait for the devices, is an error.
            with jax.transfer_guard("disallow"), self.run.profiler.step(now, self._wait_for_step):
                live, values = self.train_step(live, batch)
            # The metrics of the step before, now that this one keeps the devices at work.
            self._read()
            self.unread = Sent(now, values, self.batches.num_unsupervised)
            if now == newest + 1:
                # Waited for, once a stage: whether it runs, and how fast, is asked first.
                self._read()
            self.run.profiler.after_step(now, self._wait_for_step)
            self.run.checkpoints.check()
            answer_loss = self._evaluate(live, now, self.run.evaluations(self.stage, now))
            if self.stage.is_due(now, config.train.checkpoint_every):
                self._save(live, now, answer_loss)
        self._wait_for_save()

    def _next_batch(self) -> dict[str, jax.Array]:
        """The next batch on the devices, while the step before is at work on them: what the host
        waits for meanwhile counts as training."""
        config = self.stage.config
        phases = self.run.phases
        began = time.monotonic()
        with phases.enter("waiting"):
            batch = self.interval.next_batch(self.batches, self._is_device_busy)
        if self._is_device_busy():
            phases.move("waiting", "training", time.monotonic() - began)
        self.used.append(loader.used(batch, config.model, config.data.max_tiles))
        self._check_labels(batch)
        with jax.transfer_guard("disallow"):
            return sharding.put_batch(step.train_inputs(config.train, batch), self.mesh)

    def _check_labels(self, batch: loader.Batch) -> None:
        """Says once a stage that the patches of a batch have more labels than entries are sampled:
        in each step some patches are then taught nothing."""
        size = self.stage.config.train.sampled_entries
        if not size or self.is_sample_told:
            return
        # A sample is of a microbatch, which takes every n-th sequence; labels without weight fill
        # up the patches that have fewer. Other processes' labels come on top.
        ids = np.where(batch["patch_label_weights"] > 0, batch["patch_label_ids"], -1)
        parts = self.stage.config.train.grad_accum_steps
        number = max(len(np.setdiff1d(ids[part::parts], [-1])) for part in range(parts))
        if number > size // 2:
            self.is_sample_told = True
            self.run.progress.say(
                f"the patches that are computed at a time have {number:,} labels and "
                f"config.train.sampled_entries is {size:,}, at most half of them labels: in each "
                "step patches that show others are left out"
            )

    def _wait_for_step(self) -> None:
        jax.block_until_ready(self.unread and self.unread.metrics)

    def _wait_for_save(self) -> None:
        with self._phase("saving", self.saved):
            self.run.checkpoints.wait()

    @contextlib.contextmanager
    def _phase(self, phase: str, now: int, is_long: bool = True) -> Iterator[None]:
        """A phase after step `now` in which no step runs, and which is shown."""
        stage = self.stage.config.stage
        with self.run.phases.enter(phase), self.run.progress.busy(now, stage, phase, is_long):
            yield

    def _should_stop(self) -> bool:
        """Asked between the batches of validation and generation."""
        self.run.phases.progress()
        return self.run.stop.requested()

    def _decide(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save for the time that has passed: the same on all
        processes."""
        minutes = self.stage.config.train.checkpoint_minutes
        is_late = minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        # Every process asks, at every step, or the others wait for ever; both questions in one
        # exchange.
        return tuple(exchange.from_main((self.run.stop.seen(), is_late)))

    def _stop(self, live: TrainState, now: int) -> None:
        self._read()
        self.run.progress.say(f"stopping at step {now}")
        if now > self.saved:
            self._save(live, now, None)
        self._wait_for_save()
        raise self._stopped(now)

    def _stopped(self, now: int) -> Stopped:
        return Stopped(f"stopped at step {now} of {self.run.total}", self.run.stop.number)

    def _is_device_busy(self) -> bool:
        """Whether a step that was sent off is not finished yet."""
        # is_ready does not wait for the step, as reading the loss would.
        return self.unread is not None and not self.unread.metrics["loss"].is_ready()

    def _read(self) -> None:
        """Reads the metrics of the step before, waiting for it, and logs them where due."""
        if self.unread is None:
            return
        sent = self.unread
        self.unread = None
        self.unsupervised_read = sent.num_unsupervised
        values = {name: float(value) for name, value in jax.device_get(sent.metrics).items()}
        began = self.last_read
        self.last_read = time.monotonic()
        if began is not None:
            self.step_seconds = self.last_read - began
        self.run.phases.step(sent.step)
        num_skipped = self._checked_skips(sent.step, values.pop("num_updates"))
        self.interval.add(values)
        config = self.stage.config
        if self.stage.is_due(sent.step, config.train.log_every):
            self._log(sent.step, values["learning_rate"], num_skipped)
        elif self.run.progress.is_due(sent.step, config.stage):
            line = self.interval.means()
            line |= self.mfu_of(line["steps_per_second"], self.used)
            self.run.progress.update(sent.step, config.stage, line, is_whole=False)

    def _checked_skips(self, now: int, num_updates: float) -> int:
        """Returns how many steps of the stage made no update; raises UserError where they are too
        many."""
        config = self.stage.config
        # The optimizer counts the updates of this stage: steps without one were skipped.
        skipped = now - self.stage.begin - int(num_updates)
        if skipped > config.train.max_skipped_steps:
            raise UserError(
                f"{skipped} steps of stage {config.stage!r} had no finite gradient, the last of "
                f"them step {now}; config.train.max_skipped_steps is "
                f"{config.train.max_skipped_steps}: lower config.optim.learning_rate "
                f"{config.optim.learning_rate}"
            )
        return skipped

    def _log(self, now: int, learning_rate: float, num_skipped: int) -> None:
        """Writes and shows a line of the log, of the steps since the one before."""
        config = self.stage.config
        line = self.interval.means() | {"learning_rate": learning_rate}
        line |= {"train_seconds": self.run.train_seconds(), "skipped_steps": num_skipped}
        line |= self.mfu_of(line["steps_per_second"], self.used)
        self.used = self.used[-1:]
        # Of the rows up to this step: those of the next have been read already.
        line |= self.batches.counters((now - self.stage.begin) * config.train.batch_size)
        # Not known from the plan, so of this process alone, and since the line before: lines add up
        # after a resume.
        line["unsupervised_records"] = self.unsupervised_read - self.unsupervised_told
        self.unsupervised_told = self.unsupervised_read
        line["peak_memory_gib"] = peak_memory_gib()
        line |= self.run.phases.metrics()
        self.interval = Interval()
        self.writer.write(now, config.stage, line)
        self.run.progress.update(now, config.stage, line)

    def _evaluate(self, live: TrainState, now: int, names: Sequence[str]) -> float | None:
        """Measures and logs; returns the answer loss of validation, or None where there is none.
        What a stop cuts short is logged when the run goes on from here."""
        answer_loss = None
        config = self.stage.config
        phases = {kind.name: kind.phase for kind in self.run.kinds}
        for name in names:
            self._read()
            with self.interval.pause(), self._phase(phases[name], now):
                params = lora.merge(live.params, config.lora.alpha, config.model)
                values = self.evaluators[name].run(params, self.eval_step, self._should_stop)
                if values is None:
                    self.was_cut_short = True
                    self.run.progress.say(
                        f"{name} at step {now} cut short: they come when the run goes on from there"
                    )
                    return answer_loss
                self.writer.write(now, config.stage, values | self.run.phases.metrics())
                # Of all sources together; those of each are in the log.
                shown = [
                    f"{key.split('/')[1].replace('_', ' ')} {value:.3f}"
                    for key, value in values.items()
                    if key.count("/") == 1
                ]
                sample = self.evaluators[name].sample
                self.run.progress.say(f"{name} at step {now}, of {sample}: {', '.join(shown)}")
                answer_loss = values.get("validation/answer_loss", answer_loss)
        return answer_loss

    def _save(self, live: TrainState, now: int, answer_loss: float | None) -> None:
        self._read()
        with self.interval.pause(), self._phase("saving", now, is_long=False):
            seconds = self.run.train_seconds()
            metadata = checkpoint.describe(
                self.run.stages, self.stage.config, train_seconds=seconds, answer_loss=answer_loss
            )
            metadata["config_flags"] = list(self.run.config_flags)
            # NaN compares with nothing: among losses it could pass for the least, and be kept.
            is_comparable = answer_loss is not None and math.isfinite(answer_loss)
            quality = {"stage": self.stage.index, "answer_loss": answer_loss}
            # Not of the batches: one more than was trained on may have been fetched.
            next_sequence = (now - self.stage.begin) * self.stage.config.train.batch_size
            position = {
                "next_sequence": next_sequence,
                "schedule": self.batches.schedule_state(),
                # Since the last line, of which the next tells too; written while steps are added.
                "interval": list(self.interval.values),
                "unsupervised_records": self.unsupervised_read - self.unsupervised_told,
            }
            self.run.checkpoints.save(
                now,
                live,
                position=position,
                metadata=metadata,
                metrics=quality if is_comparable else None,
                tokenizer=self.opened.tokenizer_files,
            )
            self.saved = now
            self.saved_at = time.monotonic()
