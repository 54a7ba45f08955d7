"""The one reader of ConfigDict, and the way to config.json and back."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from alignvlm_jax.config import options as connectors
from alignvlm_jax.config.checks import check
from alignvlm_jax.config.fields import MISSING, Config
from alignvlm_jax.config.options import ConnectorConfig, connector_class, connector_names
from alignvlm_jax.errors import UserError, nearest

MIXTURES = ("tasks", "sources")
"""Fields of `data` that hold what belongs together, by name."""

LATER = ("qkv_bias", "qk_norm")
"""Fields of `model.llm` that older versions wrote no config.json with."""


def default_config_dict() -> ml_collections.ConfigDict:
    """Returns every field with its default, and an empty `stages`, for config files to change. A
    field that has none is a placeholder, which takes values of its type alone.

    The options of all connectors stand in `model.connectors`, and none in `model.connector`: two
    connectors may have an option of the same name, and which of them is chosen may yet be changed.
    """
    fields = _defaults(Config)
    del fields["stage"]
    fields["model"]["connectors"] = {name: connectors.defaults(name) for name in connector_names()}
    return ml_collections.ConfigDict({**fields, "stages": {}})


def _defaults(cls: type) -> dict[str, Any]:
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
    """Writes a preset's dataclass over the fields of a part of a ConfigDict."""
    fields.update(dataclasses.asdict(preset))


def set_model(fields: ml_collections.ConfigDict, model: Mapping[str, Any]) -> None:
    """Writes the model of a `config.json` over a ConfigDict's `model`, where another connector may
    then be chosen."""
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
    """The inverse of `to_json`; reads what older versions wrote as well."""
    return tuple(_stage(stage) for stage in current_form(stages))


def current_form(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the stages of a `config.json` as this version writes them; unchanged where they are
    damaged.

    Before connectors had options of their own, `model.connector` held those of all of them. Fields
    of `model.llm` that came later are off where they are absent: else a run from before would have
    another config than the same one today, and could not go on.
    """
    return [
        {**stage, "model": _with_later(_by_connector(_of_known(stage["model"])))}
        if isinstance(stage.get("model"), Mapping)
        else stage
        for stage in stages
    ]


def _with_later(model: dict[str, Any]) -> dict[str, Any]:
    llm = model.get("llm")
    if not isinstance(llm, Mapping):
        return model
    return {**model, "llm": {**dict.fromkeys(LATER, False), **llm}}


def _of_known(model: Mapping[str, Any]) -> dict[str, Any]:
    """Without the options of connectors that are not registered here, none of which is the
    model's."""
    groups = _group(model.get("connectors", {}), "model.connectors")
    known = connector_names()
    return {
        **model,
        "connectors": {name: options for name, options in groups.items() if name in known},
    }


def _stage(fields: Mapping[str, Any]) -> Config:
    model = _group(fields.get("model", {}), "model")
    return check(_build(Config, {**fields, "model": _by_connector(model)}, ""))


def _by_connector(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model with all options of the connector chosen in `connector`, and in
    `connectors` those of the others that are not the defaults.

    An option in `connector` goes before the same in `connectors`. One that is another connector's
    is handed on to it.

    Raises:
      UserError: an option that no connector has, a connector that does not exist, or a value of
        another type.
    """
    name, given = _given_options(model)
    whole = {}
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
    """The connector chosen, and the options that the fields of a model give to each connector."""
    groups = _group(model.get("connectors", {}), "model.connectors")
    given = {
        name: dict(_group(options, f"model.connectors.{name}")) for name, options in groups.items()
    }
    flat = dict(_group(model.get("connector", {}), "model.connector"))
    chosen = flat.pop("name", connectors.DEFAULT_CONNECTOR)
    own = connectors.defaults(chosen)
    for option, value in flat.items():
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
    if not isinstance(value, Mapping):
        raise UserError(f"config.{path} is {value!r}; it must be a group of fields")
    return value


def _options(name: str, options: Mapping[str, Any], path: str) -> ConnectorConfig:
    return _build(connector_class(name).Options, {"name": name, **options}, path)


def _plain(value: Any) -> Any:
    """ConfigDicts and FieldReferences to plain dicts, depth first."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    return (
        {key: _plain(inner) for key, inner in value.items()}
        if isinstance(value, Mapping)
        else value
    )


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it; mappings below merge, but mixtures are replaced whole."""
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
    """Builds dataclass `cls` from a mapping; unknown keys and wrong types are errors that name the
    field."""
    hints = typing.get_type_hints(cls)
    required = {field.name for field in dataclasses.fields(cls) if field.default is MISSING}
    fields = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"unknown config field config.{path}{key}{nearest(key, hints)}")
        # `check` names all that are missing at once.
        if value is not MISSING or key not in required:
            fields[key] = _convert(hints[key], value, f"{path}{key}")
    return cls(**fields)


def _convert(hint: Any, value: Any, path: str) -> Any:
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
        hint = type(args[0])  # Which of them it is, `check` looks at.
        origin = None
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config.{path} is {value}; it must be a finite number")
    if origin or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(
            f"config.{path} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}"
        )
    return value
