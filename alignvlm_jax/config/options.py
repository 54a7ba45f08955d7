"""The connector in a config: a name, and the options that the connector of this name declares in
its own file.

A connector is one file of `models/connectors/`, its options beside its Flax module, so a config
cannot be built without importing that file, and with it JAX and Flax: 1 s, which a command that
reads a config pays for its model anyway. The import is by name, and made when a config is built and
not with this module: the processes of `ingest` build no config and start without Flax. This is the
one place where `config` depends on `models`; all that `data` needs of a connector is a number
(`ModelConfig.tokens_per_tile`).
"""

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from alignvlm_jax.errors import UserError, nearest

REGISTRY_MODULE = "alignvlm_jax.models.connectors"
DEFAULT_CONNECTOR = "align"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """The base of every connector's `Options`.

    Options are strings, numbers, booleans and `Literal` choices. Whole numbers are at least 1, or
    at least the number "at_least" in a field's metadata.
    """

    name: str  # in the registry of `models.connectors`

    def tensor_sizes(self) -> Mapping[str, int]:
        """Returns the options, by name, that are sizes split along the mesh's `tensor` axis, so
        that an axis size that divides them may be chosen."""
        return {}


def connector_names() -> tuple[str, ...]:
    """Returns the names of all connectors."""
    return tuple(importlib.import_module(REGISTRY_MODULE).REGISTRY)


def connector_class(name: str) -> Any:
    """Returns a connector's class (`models.connectors.base.Connector`).

    Raises:
      UserError: no connector has this name; the message suggests the nearest.
    """
    return importlib.import_module(REGISTRY_MODULE).get(name)


def connector(name: str = DEFAULT_CONNECTOR, **options: Any) -> ConnectorConfig:
    """Returns the options of a connector: its defaults, changed by the options given."""
    return connector_class(name).Options(name=name, **options)


def defaults(name: str) -> dict[str, Any]:
    """Returns a connector's options with their defaults, without its name."""
    options = dataclasses.asdict(connector(name))
    del options["name"]
    return options


def check(options: ConnectorConfig) -> None:
    """Raises UserError where an option is no choice, or a number too small."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        path = f"config.model.connector.{field.name}"
        if typing.get_origin(hints[field.name]) is Literal:
            choices = typing.get_args(hints[field.name])
            if value not in choices:
                raise UserError(f"{path} is {value!r}{nearest(str(value), map(str, choices))}")
        # Not isinstance of the value: True is an int.
        elif hints[field.name] is int:
            bound = field.metadata.get("at_least", 1)
            if value < bound:
                raise UserError(f"{path} is {value}; it must be at least {bound}")
