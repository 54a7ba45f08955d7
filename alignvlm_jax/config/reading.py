"""The one reader of ConfigDict, and the writer and reader of config.json."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from alignvlm_jax.config import options as connectors
from alignvlm_jax.config import renamed
from alignvlm_jax.config.checks import check
from alignvlm_jax.config.fields import Config
from alignvlm_jax.config.model import MISSING
from alignvlm_jax.config.options import ConnectorConfig, connector_class, connector_names
from alignvlm_jax.errors import UserError, nearest

MIXTURES = ("tasks", "sources")
"""Mappings by name in `data` whose entries belong together: a stage replaces one whole, and does
not merge into it."""
LATER_GROUPS = ("lora",)
"""Groups of a stage that earlier versions did not have: a file without one is old, not damaged."""


def default_config_dict() -> ml_collections.ConfigDict:
    """Returns every field with its default, and an empty `stages`, for config files to change.

    A field without a default is a placeholder, which takes values of its type alone. The options of
    all connectors are in `model.connectors`, and none in `model.connector`: two connectors may have
    an option of the same name, and the choice of a connector may yet change.
    """
    fields = _defaults(Config)
    del fields["stage"]
    fields["model"]["connectors"] = {name: connectors.defaults(name) for name in connector_names()}
    return ml_collections.ConfigDict({**fields, "stages": {}})


def _defaults(cls: type) -> dict[str, Any]:
    """Returns the defaults of a dataclass as nested dicts, with placeholders for missing ones."""
    hints = typing.get_type_hints(cls)
    defaults = {}
    for field in dataclasses.fields(cls):
        if hints[field.name] is ConnectorConfig:
            defaults[field.name] = {"name": connectors.DEFAULT_CONNECTOR}
        elif dataclasses.is_dataclass(hints[field.name]):
            defaults[field.name] = _defaults(hints[field.name])
        elif field.default is MISSING:
            defaults[field.name] = config_dict.placeholder(hints[field.name])
        else:
            defaults[field.name] = getattr(cls(), field.name)
    return defaults


def set_preset(fields: ml_collections.ConfigDict, preset: Any) -> None:
    """Writes a preset's dataclass over the fields of a group of a ConfigDict, in place."""
    fields.update(dataclasses.asdict(preset))


def set_model(fields: ml_collections.ConfigDict, model: Mapping[str, Any]) -> None:
    """Writes the model of a `config.json` over a ConfigDict's `model`, in place, so that another
    connector may still be chosen there."""
    model = _by_connector(model)
    name = model["connector"].pop("name")
    model["connectors"] |= {name: model["connector"]}
    fields.update(model | {"connector": {"name": name}})


def from_config_dict(config_dict: Mapping[str, Any]) -> tuple[Config, ...]:
    """Returns the stages of a run, checked.

    Raises:
      UserError: an unknown, ill-typed or missing field, or fields that contradict each other.
    """
    base = _plain(config_dict)
    # Without stages, the base itself is the one stage, called "train".
    stages = base.pop("stages", {}) or {"train": {}}
    for name, changes in stages.items():
        if not isinstance(changes, Mapping):
            raise UserError(f"config.stages.{name} is {changes!r}; it must be a group of fields")
    return tuple(
        _stage(_merge(base, {**changes, "stage": name})) for name, changes in sorted(stages.items())
    )


def to_json(stages: tuple[Config, ...]) -> list[dict[str, Any]]:
    """Returns the stages as plain values, as `config.json` holds them."""
    return [dataclasses.asdict(stage) for stage in stages]


def from_json(stages: list[dict[str, Any]]) -> tuple[Config, ...]:
    """Returns the stages that `to_json` gave, in this version or an older one; UserError as
    `from_config_dict`."""
    if not (isinstance(stages, list) and all(isinstance(one, dict) for one in stages)):
        # As of a config.json of Hugging Face, which is one object.
        raise UserError("this is no config of a run, which is a list of stages")
    return tuple(_stage(stage) for stage in current_form(stages))


def current_form(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the stages of a `config.json` in the form that this version writes; unchanged where
    they are damaged.

    Fields that an earlier version did not have get their defaults, and renamed fields their present
    names. Before each connector had options of its own, `model.connector` held the options of all
    connectors.
    """
    return [
        {**stage, "model": _by_connector(_of_known(stage["model"]))}
        if isinstance(stage.get("model"), Mapping)
        else stage
        for stage in (_completed(Config, renamed.stage(old)) for old in stages)
    ]


def _completed(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of dataclass `cls`, as JSON has them, completed by defaults.

    Groups that are missing as a whole stay missing, as do fields without a default.
    """
    hints = typing.get_type_hints(cls)
    result = dict(fields)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if hint is not ConnectorConfig and dataclasses.is_dataclass(hint):
            given = fields.get(field.name, {} if field.name in LATER_GROUPS else None)
            if isinstance(given, Mapping):
                result[field.name] = _completed(hint, given)
        elif cls is Config or field.name in fields:
            continue  # A file without a stage's name or seed is damaged, not old.
        elif field.default not in (MISSING, dataclasses.MISSING):
            default = field.default
            # JSON has no tuples: a list keeps the result equal to what was stored.
            result[field.name] = list(default) if isinstance(default, tuple) else default
    return result


def _of_known(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model without the options of connectors that are not registered in
    this installation, and which the model therefore does not use."""
    groups = _group(model.get("connectors", {}), "model.connectors")
    known = connector_names()
    return {
        **model,
        "connectors": {name: options for name, options in groups.items() if name in known},
    }


def _stage(fields: Mapping[str, Any]) -> Config:
    """Returns a stage, checked, of its fields as plain values."""
    model = _group(fields.get("model", {}), "model")
    return check(_build(Config, {**fields, "model": _by_connector(model)}, ""))


def _by_connector(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a model with all options of the chosen connector in `connector`, and in
    `connectors` those options of the others that differ from their defaults.

    An option in `connector` takes precedence over the same option in `connectors`. If it is one of
    another connector alone, it is moved there.

    Raises:
      UserError: an option that no connector has, a connector that does not exist, or a value of
        another type.
    """
    name, given = _given_options(model)
    whole = {}
    # The chosen connector may have been given no options at all.
    for other, options in ({name: {}} | given).items():
        place = "connector" if other == name else f"connectors.{other}"
        whole[other] = dataclasses.asdict(_options(other, options, f"model.{place}."))
    connector = whole.pop(name)
    changed = {}
    for other, options in whole.items():
        defaults = connectors.defaults(other)
        changed[other] = {
            option: options[option] for option in defaults if options[option] != defaults[option]
        }
    others = {other: options for other, options in changed.items() if options}
    return {**model, "connector": connector, "connectors": others}


def _given_options(model: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """Returns the name of the chosen connector, and the options that the fields of a model give to
    each connector."""
    groups = _group(model.get("connectors", {}), "model.connectors")
    given = {
        name: dict(_group(options, f"model.connectors.{name}")) for name, options in groups.items()
    }
    flat = dict(_group(model.get("connector", {}), "model.connector"))
    chosen = flat.pop("name", connectors.DEFAULT_CONNECTOR)
    own = connectors.defaults(chosen)
    for option, value in flat.items():
        # The chosen connector comes first among those that have such an option.
        owners = [
            name for name in (chosen, *connector_names()) if option in connectors.defaults(name)
        ]
        if not owners:
            known = ["name", *own]
            raise UserError(
                f"unknown config field config.model.connector.{option}{nearest(option, known)}"
            )
        given.setdefault(owners[0], {})[option] = value
    return chosen, given


def _group(value: Any, path: str) -> Mapping[str, Any]:
    """Returns `value`; UserError where it is no group of fields."""
    if not isinstance(value, Mapping):
        raise UserError(f"config.{path} is {value!r}; it must be a group of fields")
    return value


def _options(name: str, options: Mapping[str, Any], path: str) -> ConnectorConfig:
    return _build(connector_class(name).Options, {"name": name, **options}, path)


def _plain(value: Any) -> Any:
    """Returns a ConfigDict, with all that is nested in it, as plain dicts."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    return (
        {key: _plain(inner) for key, inner in value.items()}
        if isinstance(value, Mapping)
        else value
    )


def _merge(base: dict, changes: dict) -> dict:
    """Returns `base` with `changes` over it; nested mappings merge, and mixtures are replaced
    whole."""
    merged = dict(base)
    for key, value in changes.items():
        deeper = (
            isinstance(value, Mapping)
            and isinstance(merged.get(key), Mapping)
            and key not in MIXTURES
        )
        merged[key] = _merge(merged[key], value) if deeper else value
    return merged


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """Returns dataclass `cls` built from a mapping; raises UserError, which names the field, for an
    unknown key or a wrong type."""
    hints = typing.get_type_hints(cls)
    required = {field.name for field in dataclasses.fields(cls) if field.default is MISSING}
    fields = {}
    for key, value in values.items():
        if key not in hints:
            known = renamed.hint(f"{path}{key}") or nearest(key, hints)
            raise UserError(f"unknown config field config.{path}{key}{known}")
        # A placeholder that no config set comes as None, which is MISSING. Such a field keeps its
        # default here: `check` then names all of them at once.
        if value is not MISSING or key not in required:
            fields[key] = _convert(hints[key], value, f"{path}{key}")
    return cls(**fields)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns a plain value as the type that a field's annotation gives; UserError where it is of
    another."""
    if hint is Any:
        return value
    if hint is ConnectorConfig and isinstance(value, Mapping):
        return _options(
            value["name"],
            {name: inner for name, inner in value.items() if name != "name"},
            f"{path}.",
        )
    if dataclasses.is_dataclass(hint):
        return _build(hint, _group(value, path), f"{path}.")
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is Literal:
        hint = type(args[0])  # `check` refuses values that are none of the choices.
        origin = None
    if origin is tuple and args[0] is str and isinstance(value, str):
        value = (value,)
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    # In Python a bool is an int: `True` must not pass for a number.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path} is {value}; it must be a finite number")
    if origin or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(
            f"config.{path} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}"
        )
    return value
