"""Connectors by name. Adding one is a file here and a line in `REGISTRY`."""

from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.models.connectors.align import Align
from alignvlm_jax.models.connectors.mlp import MLP

REGISTRY = {
    "align": Align,
    "mlp": MLP,
}


def get(name: str) -> type[Align] | type[MLP]:
    """Returns the module class of a connector; UserError with the nearest name where there is none."""
    if name not in REGISTRY:
        raise UserError(f"config.model.connector.name is {name!r}{nearest(name, REGISTRY)}")
    return REGISTRY[name]
