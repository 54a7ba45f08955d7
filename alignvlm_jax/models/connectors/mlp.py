"""The MLP connector of LLaVA-1.5 (arXiv 2310.03744): Linear, GELU, Linear."""

from flax import linen as nn

from alignvlm_jax.models.connectors.base import Connector
from alignvlm_jax.models.layers import Einsum
from alignvlm_jax.shapes import Array, Float


class MLP(Connector):
    """The MLP connector, which maps each patch by itself; its patches have no distribution over the
    vocabulary."""

    @nn.compact
    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "M D"]:
        """Returns a visual token for each patch."""
        vision_width = self.config.vision.width
        width = self.config.llm.width
        up = Einsum(
            "NE,ED->ND", (vision_width, width), ("vis_embed", "embed"), True, self.dtype, name="fc1"
        )
        # Both axes are the LLM's width: only the first may be sharded by it.
        down = Einsum("ND,Dd->Nd", (width, width), ("embed", None), True, self.dtype, name="fc2")
        tokens_ND = down(nn.gelu(up(features), approximate=False))
        tokens_ND = nn.with_logical_constraint(tokens_ND, ("act_batch", "act_embed"))
        return tokens_ND
