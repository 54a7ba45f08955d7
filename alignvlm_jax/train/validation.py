"""The losses of a model in training on what was held out, by source."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from alignvlm_jax.config import Config
from alignvlm_jax.data import validation
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import counted
from alignvlm_jax.parallel import exchange, sharding
from alignvlm_jax.train import step
from alignvlm_jax.train.evaluator import Kind, with_sources
from alignvlm_jax.train.state import Params


class Validation:
    """Batches of the validation split of every source, the same ones each time."""

    def __init__(self, config: Config, mesh: Mesh, opened: StageData):
        """Raises UserError where nothing was held out, or nothing of it can be read."""
        self._config = config
        self._mesh = mesh
        size = step.validation_batch_size(config.train)
        local_rows = sharding.rows_of_process(mesh, size).tolist()
        sources = validation.by_source(config, opened)
        num_sequences = config.train.validation_sequences // len(sources)
        self._batches = {
            name: validation.ValidationBatches(
                sequences, size, num_sequences, local_rows, exchange.gather
            )
            for name, sequences in sources.items()
        }
        used = sum(batches.num_records for batches in self._batches.values())
        held = sum(batches.num_held for batches in self._batches.values())
        # A loss of a handful of records says little about others.
        self.sample = f"{used:,} of {counted(held, 'held-out record')}"

    def run(
        self, params: Params, eval_step: step.EvalStep, should_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """See `Evaluator`. Returns `validation/answer_loss` and so on over all sources, and with
        several `validation/SOURCE/...` of each, without those of which nothing was seen."""
        sums: dict[str, list[step.Metrics]] = {name: [] for name in self._batches}
        for name, batches in self._batches.items():
            for batch in batches:
                # A collective: all processes have as many batches, and ask before each.
                if should_stop():
                    return None
                inputs = step.eval_inputs(self._config.train, batch)
                sums[name].append(
                    jax.device_get(eval_step(params, sharding.put_batch(inputs, self._mesh)))
                )
        return with_sources("validation", sums, _means)


def _means(parts: Sequence[step.Metrics]) -> dict[str, float]:
    totals = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
    weights = {"patch_loss": "patch_weight"}
    return {
        name: value
        for name, value in step.means(totals).items()
        # Of no page with known words a loss of 0 would look perfect.
        if totals[weights.get(name, "answer_weight")]
    }


VALIDATION = Kind(
    name="validation",
    phase="validating",
    every=lambda config: config.train.validate_every,
    open=lambda model, config, mesh, opened: Validation(config, mesh, opened),
)
