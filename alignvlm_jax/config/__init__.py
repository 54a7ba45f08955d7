"""Typed configuration: frozen dataclasses (`fields`, `model`), the checks of their values
(`checks`, `model_checks`) and the one reader of ConfigDict (`reading`).

A config file gives a ConfigDict (`default_config_dict()` plus changes). `from_config_dict` turns it
into a tuple of `Config`, one for each stage: a curriculum is a base and, under `stages`, named
differences from it. Stages run in the order of their names, since a ConfigDict keeps its keys
sorted. `describing` reads the comments beside the fields.

A ConfigDict holds the options of all connectors (`options`), as `model.connectors.NAME.OPTION`, so
that one field, `model.connector.name`, chooses another connector. `model.connector.OPTION` is an
option of the chosen connector, and takes precedence.
"""

from alignvlm_jax.config.checks import SAVED_BY_NAME, check
from alignvlm_jax.config.fields import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from alignvlm_jax.config.model import (
    MISSING,
    LLMConfig,
    ModelConfig,
    RopeScaling,
    VisionConfig,
)
from alignvlm_jax.config.model_checks import nearest_divisor
from alignvlm_jax.config.options import (
    DEFAULT_CONNECTOR,
    ConnectorConfig,
    connector,
    connector_class,
    connector_names,
)
from alignvlm_jax.config.reading import (
    current_form,
    default_config_dict,
    from_config_dict,
    from_json,
    set_model,
    set_preset,
    to_json,
)

__all__ = [
    "DEFAULT_CONNECTOR",
    "MISSING",
    "SAVED_BY_NAME",
    "Config",
    "ConnectorConfig",
    "DataConfig",
    "EvalConfig",
    "LLMConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "SourceConfig",
    "TrainConfig",
    "VisionConfig",
    "check",
    "connector",
    "connector_class",
    "connector_names",
    "current_form",
    "default_config_dict",
    "from_config_dict",
    "from_json",
    "nearest_divisor",
    "set_model",
    "set_preset",
    "to_json",
]
