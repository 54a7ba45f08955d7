"""The H-Reducer of mPLUG-DocOwl 1.5 (arXiv 2403.12895): neighbours in a line become one visual token.

Text runs from left to right, so `merged_columns` patches side by side are merged, 1 x 4 in the paper. As the release
has it (X-PLUG/mPLUG-DocOwl, `MplugDocOwlHReducerModel`), two convolutions whose stride is their kernel, with a GELU
between them, then a linear layer: the first turns 4 patches of E channels into as many of them again, the second those
into one, both seeing all four. Left out is the learned token that the release ends every tile with. The paper says of
no weights how they are drawn; here as all linear maps are.
"""

import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.models.connectors.base import ConnectorOutput, PatchLabels, Product
from alignvlm_jax.models.layers import Einsum
from alignvlm_jax.shapes import Array, Float


class HReducer(nn.Module):
    """Has no distribution over words. Attributes: the model's `config`, the computation's `dtype`."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, features: Float[Array, "N E"], text_table: Float[Array, "V D"], labels: PatchLabels | None
    ) -> ConnectorOutput:
        """Returns a visual token for each `merged_columns` patches; the text table and the labels are not looked at."""
        del text_table, labels
        c, merged = self.config, self.config.connector.merged_columns
        width = c.vision.width
        # Patches come row after row, and rows are multiples of what is merged: x and y number the merged patches.
        x_NxE = features.reshape(-1, merged, width)
        shape, axes = (merged, width, merged, width), (None, "vis_embed", None, "vis_mlp")
        hidden_NyF = Einsum("NxE,xEyF->NyF", shape, axes, True, self.dtype, name="conv1")(x_NxE)
        hidden_NyF = nn.with_logical_constraint(nn.gelu(hidden_NyF, approximate=False), ("act_batch", None, "act_mlp"))
        shape, axes = (merged, width, width), (None, "vis_mlp", "vis_embed")
        x_NE = Einsum("NyF,yFE->NE", shape, axes, True, self.dtype, name="conv2")(hidden_NyF)
        x_NE = nn.with_logical_constraint(x_NE, ("act_batch", "act_embed"))
        tokens_ND = Einsum("NE,ED->ND", (width, c.llm.width), ("vis_embed", "embed"), True, self.dtype, name="fc")(x_NE)
        tokens_ND = nn.with_logical_constraint(tokens_ND, ("act_batch", "act_embed"))
        return ConnectorOutput(tokens_ND, jnp.zeros(features.shape[0], jnp.float32))

    @staticmethod
    def products(config: ModelConfig, patches: int) -> list[Product]:
        """Returns what `train.flops` counts."""
        merged, width = config.connector.merged_columns, config.vision.width
        tokens = patches // merged
        return [
            Product(2 * tokens * (merged * width) ** 2, "connector/conv1/"),
            Product(2 * tokens * merged * width**2, "connector/conv2/"),
            Product(2 * tokens * width * config.llm.width, "connector/fc/"),
        ]
