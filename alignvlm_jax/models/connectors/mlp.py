"""The MLP connector of LLaVA-1.5 (arXiv 2310.03744): Linear, GELU, Linear."""

import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.models.connectors.base import ConnectorOutput, PatchLabels, Product
from alignvlm_jax.models.layers import Einsum
from alignvlm_jax.shapes import Array, Float


class MLP(nn.Module):
    """Maps each patch by itself; has no distribution over words. Attributes: the model's `config`, the `dtype`."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, features: Float[Array, "N E"], text_table: Float[Array, "V D"], labels: PatchLabels | None
    ) -> ConnectorOutput:
        """Returns a visual token for each patch; the text table and the labels are not looked at."""
        del text_table, labels
        vision_width, width = self.config.vision.width, self.config.llm.width
        up = Einsum("NE,ED->ND", (vision_width, width), ("vis_embed", "embed"), True, self.dtype, name="fc1")
        # Both axes are the LLM's width: only the first may be sharded by it.
        down = Einsum("ND,Dd->Nd", (width, width), ("embed", None), True, self.dtype, name="fc2")
        tokens_ND = down(nn.gelu(up(features), approximate=False))
        tokens_ND = nn.with_logical_constraint(tokens_ND, ("act_batch", "act_embed"))
        return ConnectorOutput(tokens_ND, jnp.zeros(features.shape[0], jnp.float32))

    @staticmethod
    def products(config: ModelConfig, patches: int) -> list[Product]:
        """Returns what `train.flops` counts."""
        vision_width, width = config.vision.width, config.llm.width
        return [
            Product(2 * patches * vision_width * width, "connector/fc1/"),
            Product(2 * patches * width**2, "connector/fc2/"),
        ]
