"""A comparison of connectors on an equal footing: the same towers, steps and sequences for each.

    compare:towers       trains the two towers once: the demonstration's language model, and a
                         vision encoder that learns from patch labels alone what patches show
    compare:language_model
                         another language model beside such a vision encoder, which is loaded
    compare:connectors   whole pages; the towers' parameters and an initialised connector, all of
                         which is trained
    compare:supervision  small pages; only the language model is loaded and the rest initialised, to
                         measure what patch labels are worth

`make compare` trains all of `configs/sweeps/compare.py`. As in the paper, the towers are the same
for every connector. Only ALIGN can learn from patch labels; it does in the rows of the sweep that
set `patch_token_weight`.
"""

import ml_collections

from alignvlm_jax.configs import demo
from alignvlm_jax.errors import nearest

TOWERS = "runs/compare/towers"


def get_config(part: str = "connectors") -> ml_collections.ConfigDict:
    """Returns the stages of a part of the comparison.

    Args:
      part: "towers", "language_model", "connectors" or "supervision".

    Raises:
      ValueError: there is no such part.
    """
    if part not in STAGES:
        raise ValueError(f"there is no part {part!r} of the comparison{nearest(part, STAGES)}")
    config = demo.get_config()
    config.name = "compare"
    config.stages = ml_collections.ConfigDict(STAGES[part](config.stages))
    if part == "towers":
        return config
    config.init_from = TOWERS
    if part == "language_model":
        return config
    # No connector but ALIGN could use the labels: without them all learn from the same signal.
    config.train.patch_token_weight = 0.0
    config.train.validate_every = 200
    config.train.checkpoint_every = 1000
    config.train.generate_questions = 100
    # The rates of the sweep were found with it.
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.eval.num_questions = 300
    if part == "supervision":
        config.eval.splits = ("validation_small",)
    return config


def _towers(stages: ml_collections.ConfigDict) -> dict:
    """Returns the stages that train the towers, those of the demonstration."""
    return {name: stages[name] for name in ("stage0_lines", "stage0_pages", "stage1")}


def _language_model(stages: ml_collections.ConfigDict) -> dict:
    """Returns the stages that train a language model as the towers' is."""
    texts = {name: stages[name] for name in ("stage0_lines", "stage0_pages")}
    texts["stage0_lines"].train.load = ("vision/.*",)
    return texts


def _connectors(stages: ml_collections.ConfigDict) -> dict:
    """Returns the stage that trains a new connector between both trained towers."""
    data = stages.stage2.data
    return {
        "read": {
            "data": data,
            "train": {"num_steps": 500, "load": ("vision/.*", "llm/.*"), "generate_every": 100},
        }
    }


def _supervision(stages: ml_collections.ConfigDict) -> dict:
    """Returns the stage that trains a new vision encoder and connector."""
    data = {**demo.SMALL_PAGES, "seq_len": 96, "tasks": stages.stage2.data.tasks}
    return {
        "read": {
            "data": data,
            "train": {"num_steps": 600, "load": ("llm/.*",), "generate_every": 50},
            "optim": {"learning_rate": 2e-3},
        }
    }


STAGES = {
    "towers": _towers,
    "language_model": _language_model,
    "connectors": _connectors,
    "supervision": _supervision,
}
