"""A sweep over learning rates around the config's own, for each connector.

A fair comparison of connectors needs the best learning rate of each.

configs/sweeps/learning_rates.py                        the demonstration, in its last stages
configs/sweeps/learning_rates.py:stage2.py:llama32_1b   a stage of the paper
"""

import runpy
from collections.abc import Iterator

from alignvlm_jax.configs import demo
from alignvlm_jax.models.connectors import REGISTRY

FACTORS = (0.25, 0.5, 1.0, 2.0)
DEMO_STAGES = ("stage1", "stage2")


def sweep(base: str = "demo.py") -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields (name, config, changed fields) of every run; `base` is a config file's name."""
    alike = demo.by_answers(base)
    own = _rates(base)
    own |= {field: alike[field] for field in own.keys() & alike.keys()}
    for connector in REGISTRY:
        for factor in FACTORS:
            rates = {field: factor * rate for field, rate in own.items()}
            yield (
                f"{connector}/x{factor:g}_seed0",
                f"configs/{base}",
                {"model.connector.name": connector, **alike, **rates},
            )


def _rates(base: str) -> dict[str, float]:
    """Returns the learning rates of a config by field."""
    # Run by path, as the config flag does it: a base may have an argument, FILE:ARG.
    file, *argument = base.split(":")
    config = runpy.run_path(f"configs/{file}")["get_config"](*argument)
    if file == "demo.py":
        rates = {stage: config.stages[stage].optim.learning_rate for stage in DEMO_STAGES}
        return {f"stages.{stage}.optim.learning_rate": rate for stage, rate in rates.items()}
    return {"optim.learning_rate": config.optim.learning_rate}
