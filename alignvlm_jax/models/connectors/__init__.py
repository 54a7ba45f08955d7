"""The registry of connectors, by name.

A new connector is a file here and a line in `REGISTRY`; `base.Connector` says what it may define.
"""

from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.models.connectors.align import Align
from alignvlm_jax.models.connectors.base import Connector
from alignvlm_jax.models.connectors.c_abstractor import CAbstractor
from alignvlm_jax.models.connectors.h_reducer import HReducer
from alignvlm_jax.models.connectors.mlp import MLP
from alignvlm_jax.models.connectors.ovis import Ovis
from alignvlm_jax.models.connectors.perceiver import Perceiver

REGISTRY: dict[str, type[Connector]] = {
    "align": Align,
    "mlp": MLP,
    "perceiver": Perceiver,
    "ovis": Ovis,
    "h_reducer": HReducer,
    "c_abstractor": CAbstractor,
}


def get(name: str) -> type[Connector]:
    """Returns the class of a connector.

    Raises:
      UserError: no connector has this name; the message suggests the nearest.
    """
    if name not in REGISTRY:
        raise UserError(f"config.model.connector.name is {name!r}{nearest(str(name), REGISTRY)}")
    return REGISTRY[name]
