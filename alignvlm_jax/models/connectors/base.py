"""What every connector takes and gives."""

from typing import NamedTuple

from alignvlm_jax.shapes import Array, Float, Int


class PatchLabels(NamedTuple):
    """The tokens that each patch shows, and their shares of it. Patch-token supervision: README, "Two ideas beyond the
    paper"."""

    ids: Int[Array, "N k"]
    weights: Float[Array, "N k"]


class ConnectorOutput(NamedTuple):
    """Visual tokens in the LLM's embedding space.

    `patch_nll` is the cross-entropy of each patch's distribution over the vocabulary against its labels, in nats; zeros
    where no labels were given or the connector has no such distribution.
    """

    tokens: Float[Array, "N D"]
    patch_nll: Float[Array, "N"]
