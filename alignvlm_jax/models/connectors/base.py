"""What every connector takes and gives."""

import dataclasses
from typing import NamedTuple

from alignvlm_jax.shapes import Array, Float, Int


class PatchLabels(NamedTuple):
    """The tokens that each patch shows, and their shares of it. Patch-token supervision: README, "Two ideas beyond the
    paper"."""

    ids: Int[Array, "N k"]
    weights: Float[Array, "N k"]


@dataclasses.dataclass(frozen=True)
class Product:
    """Forward FLOPs of matrix products: with the parameters whose path begins with `prefix`, or, without one, of
    activations with each other."""

    flops: float
    prefix: str | None = None


class ConnectorOutput(NamedTuple):
    """Visual tokens in the LLM's embedding space: `config.ModelConfig.slots_per_tile` of each tile, tile after tile.

    `patch_nll` is the cross-entropy of each patch's distribution over the vocabulary against its labels, in nats; zeros
    where no labels were given or the connector has no such distribution.
    """

    tokens: Float[Array, "tokens D"]
    patch_nll: Float[Array, "N"]
