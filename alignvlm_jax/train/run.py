"""A run: its stages, and what all of them share from the first step to the last."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from alignvlm_jax.config import Config
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import metrics
from alignvlm_jax.train.checkpoint import BrokenCheckpoint, Checkpoints
from alignvlm_jax.train.evaluator import Kind
from alignvlm_jax.train.goodput import Phases
from alignvlm_jax.train.heartbeat import Heartbeat
from alignvlm_jax.train.hooks import Profiler, StopSignal
from alignvlm_jax.train.metrics import Progress


class Stopped(UserError):
    """The run was told to stop by the signal `number`, and has saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage, and the steps, counted over the run, between which it lies."""

    index: int
    config: Config
    begin: int
    end: int

    def is_due(self, now: int, every: int) -> bool:
        """Whether what is done every so many steps, and at the end, is done at step `now`."""
        return (now - self.begin) % every == 0 or now == self.end


@dataclasses.dataclass(kw_only=True)
class Run:
    """What all stages of a run share."""

    stages: tuple[Config, ...]
    kinds: tuple[Kind, ...]
    total: int
    folder: Path
    checkpoints: Checkpoints
    progress: Progress
    stop: StopSignal
    phases: Phases
    heartbeat: Heartbeat
    profiler: Profiler
    began: float
    opened: dict[int, StageData]  # by stage; each goes to its stage, and with it
    config_flags: Sequence[str] = ()  # of the command that trains it
    earlier_seconds: float | None = None
    announced: bool = False
    broken: tuple[int, BrokenCheckpoint] | None = None

    def newest(self) -> int:
        """The newest step whose checkpoint is not known to be broken; 0 without one."""
        return max(
            (
                step
                for step in self.checkpoints.steps()
                if not self.broken or step != self.broken[0]
            ),
            default=0,
        )

    def evaluations(self, stage: Stage, now: int) -> list[str]:
        """The names of the evaluators that run at step `now`, in their order.

        Each logs one line.
        """
        # In the order of the kinds: how many of them are logged says which are lacking.
        due = [(kind.name, kind.every(stage.config)) for kind in self.kinds]
        return [name for name, every in due if every and stage.is_due(now, every)]

    def lacking(self, stage: Stage, step: int) -> list[str]:
        """The evaluators of a step that a stop kept from being logged; they are logged in their
        order."""
        logged = metrics.num_evaluations(self.folder / metrics.FILE, step)
        return [] if logged is None else self.evaluations(stage, step)[logged:]

    def train_seconds(self) -> float:
        """Seconds of training over stages and resumes: everything that the user waits for."""
        return (self.earlier_seconds or 0.0) + time.monotonic() - self.began
