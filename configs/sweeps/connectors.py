"""A sweep over connectors, LLMs and seeds with all else equal, as in the paper's tables 2 and 3.

configs/sweeps/connectors.py              the demonstration with every connector, three seeds
configs/sweeps/connectors.py:stage2.py    a stage of the paper with every LLM
"""

from collections.abc import Iterator

from alignvlm_jax.configs import demo, paper
from alignvlm_jax.models.connectors import REGISTRY

SEEDS = range(3)


def sweep(base: str = "demo.py") -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yields (name, config, changed fields) of every run; `base` is a config file's name."""
    # No connector but ALIGN has a patch loss: all else being equal, none learns from it alone.
    fields = demo.by_answers(base)
    llms = [""] if base == "demo.py" else [f":{llm}" for llm in paper.LLMS]
    for llm in llms:
        for connector in REGISTRY:
            for seed in SEEDS:
                yield (
                    f"{llm.removeprefix(':') or 'demo'}/{connector}_seed{seed}",
                    f"configs/{base}{llm}",
                    {"model.connector.name": connector, "seed": seed, **fields},
                )
