"""The H-Reducer of mPLUG-DocOwl 1.5 (arXiv 2403.12895): patches side by side become one visual
token.

Text runs from left to right, so `merged_columns` neighbours in a row of patches are merged, 1 x 4
in the paper. As in the release (X-PLUG/mPLUG-DocOwl, `MplugDocOwlHReducerModel`), there are two
convolutions whose stride is their kernel, with a GELU between them, then a linear layer. The first
convolution maps 4 patches of E channels to 4 positions of E channels, the second these to one
vector of E channels; both see all four. The learned token with which the release ends every tile
is left out. The paper does not say how weights are initialised; here they are like all linear maps.
"""

import dataclasses

from flax import linen as nn

from alignvlm_jax.config import ConnectorConfig, LLMConfig, VisionConfig, nearest_divisor
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.connectors.base import Connector
from alignvlm_jax.models.layers import Einsum
from alignvlm_jax.shapes import Array, Float


class HReducer(Connector):
    """The H-Reducer connector; its patches have no distribution over the vocabulary."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Defaults are the paper's."""

        merged_columns: int = 4  # patches side by side that become one token

    @staticmethod
    def num_tokens(vision: VisionConfig, options: Options) -> int:
        """Returns the number of visual tokens of a tile, one for each `merged_columns` patches."""
        return vision.num_patches // options.merged_columns

    @staticmethod
    def check(vision: VisionConfig, llm: LLMConfig, options: Options) -> None:
        """Raises UserError where `merged_columns` does not divide a tile's columns of patches."""
        (_, columns) = vision.patch_grid
        merged = options.merged_columns
        if columns % merged:
            width = max(round(columns / merged), 1) * merged * vision.patch_width
            raise UserError(
                f"config.model.vision.tile_width {vision.tile_width} has {columns} columns of "
                f"patches, no multiple of config.model.connector.merged_columns {merged}; nearest "
                f"that fit: tile_width {width}, or merged_columns "
                f"{nearest_divisor(columns, merged)}"
            )

    @nn.compact
    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "M D"]:
        """Returns a visual token for each `merged_columns` patches."""
        c = self.config
        merged = self.options.merged_columns
        width = c.vision.width
        # [N, E] to [N / merged, merged, E]: patches come row after row, and `check` made sure that
        # merged divides a row, so no group spans two rows. x and y number the patches of a group.
        x_NxE = features.reshape(-1, merged, width)
        shape = (merged, width, merged, width)
        axes = (None, "vis_embed", None, "vis_mlp")
        hidden_NyF = Einsum("NxE,xEyF->NyF", shape, axes, True, self.dtype, name="conv1")(x_NxE)
        hidden_NyF = nn.with_logical_constraint(
            nn.gelu(hidden_NyF, approximate=False), ("act_batch", None, "act_mlp")
        )
        shape = (merged, width, width)
        axes = (None, "vis_mlp", "vis_embed")
        x_NE = Einsum("NyF,yFE->NE", shape, axes, True, self.dtype, name="conv2")(hidden_NyF)
        x_NE = nn.with_logical_constraint(x_NE, ("act_batch", "act_embed"))
        tokens_ND = Einsum(
            "NE,ED->ND", (width, c.llm.width), ("vis_embed", "embed"), True, self.dtype, name="fc"
        )(x_NE)
        tokens_ND = nn.with_logical_constraint(tokens_ND, ("act_batch", "act_embed"))
        return tokens_ND
