"""What a run measures now and then while it trains.

The loop knows only this: commands name the kinds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.train.state import Params
from alignvlm_jax.train.step import EvalStep

T = TypeVar("T")


class Evaluator(Protocol):
    """One measurement, set up for a stage.

    Attributes:
      sample: how many records or questions it is of, for messages.
    """

    sample: str

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


def with_sources(
    what: str, parts: Mapping[str, Sequence[T]], means: Callable[[Sequence[T]], Mapping[str, float]]
) -> dict[str, float]:
    """Returns the means over all values as `WHAT/NAME`, and those of each source.

    With several sources, the means of each are `WHAT/SOURCE/NAME`.

    Args:
      what: prefix of the names.
      parts: values by source.
      means: returns the means of some values by name.
    """
    groups = {what: [part for of_source in parts.values() for part in of_source]}
    if len(parts) > 1:
        groups |= {f"{what}/{source}": of_source for source, of_source in parts.items()}
    return {
        f"{prefix}/{name}": value
        for prefix, group in groups.items()
        for name, value in means(group).items()
    }
