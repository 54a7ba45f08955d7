"""The one reader of ConfigDict, and the way to config.json and back."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from alignvlm_jax.config.checks import check
from alignvlm_jax.config.fields import Config
from alignvlm_jax.errors import UserError, nearest

MIXTURES = ("tasks", "sources")
"""Fields of `data` that hold what belongs together, by name."""


def default_config_dict() -> ml_collections.ConfigDict:
    """Returns every field with its default, and an empty `stages`, for config files to change."""
    fields = dataclasses.asdict(Config())
    del fields["stage"]
    return ml_collections.ConfigDict({**fields, "stages": {}})


def set_preset(fields: ml_collections.ConfigDict, preset: Any) -> None:
    """Writes a preset's dataclass over the fields of a part of a ConfigDict."""
    fields.update(dataclasses.asdict(preset))


def from_config_dict(config_dict: Mapping[str, Any]) -> tuple[Config, ...]:
    """Returns the stages of a run, checked.

    Raises:
      UserError: an unknown or ill-typed field, or fields that contradict each other.
    """
    base = _plain(config_dict)
    stages = base.pop("stages", {}) or {"train": {}}
    for name, changes in stages.items():
        if not isinstance(changes, Mapping):
            raise UserError(f"config.stages.{name} is {changes!r}; it must be a group of fields")
    return tuple(
        check(_build(Config, _merge(base, {**changes, "stage": name}), "")) for name, changes in sorted(stages.items())
    )


def to_json(stages: tuple[Config, ...]) -> list[dict[str, Any]]:
    """Returns the stages as plain values, as `config.json` holds them."""
    return [dataclasses.asdict(stage) for stage in stages]


def from_json(stages: list[dict[str, Any]]) -> tuple[Config, ...]:
    """The inverse of `to_json`."""
    return tuple(check(_build(Config, stage, "")) for stage in stages)


def _plain(value: Any) -> Any:
    """ConfigDicts and FieldReferences to plain dicts, depth first."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it; mappings below merge, but mixtures are replaced whole."""
    merged = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in MIXTURES
        merged[key] = _merge(merged[key], value) if deeper else value
    return merged


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """Builds dataclass `cls` from a mapping; unknown keys and wrong types are errors that name the field."""
    hints = typing.get_type_hints(cls)
    fields = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"unknown config field config.{path}{key}{nearest(key, hints)}")
        fields[key] = _convert(hints[key], value, f"{path}{key}")
    return cls(**fields)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config.{path} is {value!r}; it must be a group of fields")
        return _build(hint, value, f"{path}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path} is {value}; it must be a finite number")
    if origin or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"config.{path} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}")
    return value
