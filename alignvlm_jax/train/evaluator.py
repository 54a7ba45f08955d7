"""What a run measures now and then while it trains.

The loop knows only this: commands name the kinds.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.train.state import Params
from alignvlm_jax.train.step import EvalStep


class Evaluator(Protocol):
    """One measurement, set up for a stage."""

    def run(
        self, params: Params, eval_step: EvalStep, should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Returns metrics by name, for one line of the log; None when told to stop meanwhile.

        Args:
          params: of the model, as the training step has them.
          eval_step: compiled for the stage, for batches of `step.validation_batch_size` rows.
          should_stop: asked between two batches, by all processes alike.
        """


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of evaluator.

    Attributes:
      name: in messages.
      phase: of `goodput.Phases`, in which its time counts.
      every: steps between two runs in a stage; 0 where the stage has none.
      open: sets it up for a stage, on what the stage has open; UserError where it cannot be.
      check: UserError where a later stage will not be able to: hours later is too late to be told.
    """

    name: str
    phase: str
    every: Callable[[Config], int]
    open: Callable[[VLM, Config, Mesh, StageData], Evaluator]
    check: Callable[[Config, StageData], None] = lambda config, opened: None
