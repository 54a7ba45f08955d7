"""The connector's part of a config: a name, and the options that the connector of this name
declares in its own file.

A connector is one file of `models/connectors/`, its options beside its Flax module, so a config
cannot be built without importing that file, and with it JAX and Flax: 1 s, which a command that
reads a config pays for its model anyway. The import is by name, and made when a config is built,
not with this module: the processes of `ingest` build none and start without Flax. This is the one
place where `config` reaches up to `models`; what `data` must know of a connector is a number
(`ModelConfig.tokens_per_tile`).
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

REGISTRY_MODULE = "alignvlm_jax.models.connectors"
DEFAULT_CONNECTOR = "align"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """What the options of every connector have: each connector's `Options` derive from it.

    Options are strings, numbers, booleans and `Literal` choices. Whole numbers are at least 1, or
    what a field's metadata say as "at_least".
    """

    name: str  # in the registry of `models.connectors`

    def tensor_sizes(self) -> Mapping[str, int]:
        """Returns the options, by name, that are sizes along the mesh's `tensor` axis, so that one
        may be chosen."""
        return {}


def connector_names() -> tuple[str, ...]:
    """Returns the names of all connectors."""
    return tuple(importlib.import_module(REGISTRY_MODULE).REGISTRY)


def connector_class(name: str) -> Any:
    """Returns a connector's class (`models.connectors.base.Connector`); UserError with the nearest
    name for none."""
    return importlib.import_module(REGISTRY_MODULE).get(name)


def connector(name: str = DEFAULT_CONNECTOR, **options: Any) -> ConnectorConfig:
    """Returns the options of a connector: its defaults, and those given."""
    return connector_class(name).Options(name=name, **options)


def defaults(name: str) -> dict[str, Any]:
    """Returns a connector's options with their defaults, without its name."""
    options = dataclasses.asdict(connector(name))
    del options["name"]
    return options
