"""Connectors on an equal footing: towers as they are given, a connector drawn anew, equal steps on
equal rows.

    compare.py:towers       what a connector is put between, made once: the demonstration's language
    model, then, with
                            it frozen, a vision encoder that learns from patch labels what patches
                            show
    compare.py:connectors   whole pages; the towers' parameters and a new connector, and everything
    is trained compare.py:supervision  small pages; the language model alone is given, the rest is
    drawn: what labels are worth

`make compare` trains all of `configs/sweeps/compare.py`. As in the paper, the towers are the same
for every connector. Only ALIGN can be told what a patch shows; without `patch_token_weight`, which
rows of the sweep set, it is not.
"""

import ml_collections

from alignvlm_jax.errors import nearest
from configs import demo

TOWERS = "runs/compare/towers"


def get_config(part: str = "connectors") -> ml_collections.ConfigDict:
    """Returns the stages of a part of the comparison; ValueError with the nearest for another."""
    if part not in STAGES:
        raise ValueError(f"there is no part {part!r} of the comparison{nearest(part, STAGES)}")
    config = demo.get_config()
    config.name = "compare"
    config.stages = ml_collections.ConfigDict(STAGES[part](config.stages))
    if part == "towers":
        return config
    config.init_from = TOWERS
    config.train.patch_token_weight = 0.0
    config.train.validate_every = 200
    config.train.checkpoint_every = 1000
    config.train.generate_questions = 100
    config.optim.learning_rate = 1e-3
    config.eval.num_questions = 300
    if part == "supervision":
        config.eval.splits = ("validation_small",)
    return config


def _towers(stages: ml_collections.ConfigDict) -> dict:
    """The stages of the demonstration that come before pages and words meet."""
    reading = stages.stage1.to_dict()
    reading["train"] |= {"num_steps": 1200, "trainable": ("vision/.*", "connector/.*")}
    reading["optim"] = {"learning_rate": 2e-3}
    return {
        "stage0_lines": stages.stage0_lines,
        "stage0_pages": stages.stage0_pages,
        "stage1": reading,
    }


def _connectors(stages: ml_collections.ConfigDict) -> dict:
    data = stages.stage2.data
    return {
        "read": {
            "data": data,
            "train": {"num_steps": 500, "load": ("vision/.*", "llm/.*"), "generate_every": 100},
        }
    }


def _supervision(stages: ml_collections.ConfigDict) -> dict:
    data = {**demo.SMALL_PAGES, "seq_len": 96, "tasks": stages.stage2.data.tasks}
    return {
        "read": {
            "data": data,
            "train": {"num_steps": 600, "load": ("llm/.*",), "generate_every": 50},
            "optim": {"learning_rate": 2e-3},
        }
    }


STAGES = {"towers": _towers, "connectors": _connectors, "supervision": _supervision}
