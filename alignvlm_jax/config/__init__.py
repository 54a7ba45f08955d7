"""Typed configuration: frozen dataclasses (`fields`), what they may hold (`checks`), the one reader of ConfigDict
(`reading`).

A config file gives a ConfigDict (`default_config_dict()` plus changes). `from_config_dict` turns it into a tuple of
`Config`, one for each stage: a curriculum is a base and, under `stages`, named differences from it. Stages run in the
order of their names: a ConfigDict keeps its keys sorted and knows no other.
"""

from alignvlm_jax.config.checks import check
from alignvlm_jax.config.fields import (
    Config,
    ConnectorConfig,
    DataConfig,
    EvalConfig,
    LLMConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    SourceConfig,
    TrainConfig,
    VisionConfig,
)
from alignvlm_jax.config.reading import default_config_dict, from_config_dict, from_json, set_preset, to_json

__all__ = [
    "Config",
    "ConnectorConfig",
    "DataConfig",
    "EvalConfig",
    "LLMConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "SourceConfig",
    "TrainConfig",
    "VisionConfig",
    "check",
    "default_config_dict",
    "from_config_dict",
    "from_json",
    "set_preset",
    "to_json",
]
