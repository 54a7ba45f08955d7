"""The Perceiver Resampler of Flamingo (arXiv 2204.14198): a fixed number of learned latents attend
to the patches of a tile.

In each layer the latents attend to the tile's patches and to themselves, then pass an MLP with a
squared ReLU. Flamingo was not released: where its text is silent this follows OpenFlamingo
(`PerceiverResampler`), which has a norm on the inputs of each sublayer and after the last layer, no
bias, and latents from N(0, 1); OpenFlamingo's GELU is not taken over. Heads are those of the
encoder. A linear map takes the latents to the LLM's width, where in Flamingo cross-attention reads
them; the embedding of time is left out, since a tile is no frame. Flamingo has 64 latents and 6
layers.

Letters: `shapes.py`; B here counts tiles, M their latents, S what a latent reads.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from alignvlm_jax.config import ConnectorConfig, VisionConfig
from alignvlm_jax.models.connectors.base import Connector
from alignvlm_jax.models.layers import Einsum, LayerNorm, scan_blocks
from alignvlm_jax.ops.attention import attention
from alignvlm_jax.shapes import Array, Float

MLP_FACTOR = 4


class Attention(nn.Module):
    """Attention of the latents to patches and latents, which have norms of their own."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, latents_BME: Float[Array, "B M E"], patches_BPE: Float[Array, "B P E"]
    ) -> Float[Array, "B M E"]:
        c = self.config
        latents_BME = LayerNorm(c.width, c.norm_eps, name="latents_norm")(latents_BME)
        patches_BPE = LayerNorm(c.width, c.norm_eps, name="patches_norm")(patches_BPE)
        both_BSE = jnp.concatenate([patches_BPE, latents_BME], axis=1)  # S = P + M
        head_dim = c.width // c.num_heads
        shape = (c.width, c.num_heads, head_dim)
        axes = ("vis_embed", "vis_heads", "head_dim")
        query, key, value = (
            nn.with_logical_constraint(
                Einsum("BSE,EHh->BSHh", shape, axes, dtype=self.dtype, name=name)(inputs),
                ("act_batch", "act_len", "act_heads", None),
            )
            for name, inputs in (("q", latents_BME), ("k", both_BSE), ("v", both_BSE))
        )
        shape = (c.num_heads, head_dim, c.width)
        axes = ("vis_heads", "head_dim", "vis_embed")
        return Einsum("BMHh,HhE->BME", shape, axes, dtype=self.dtype, name="o")(
            attention(query, key, value)
        )


class MLP(nn.Module):
    """A norm and two linear layers with a squared ReLU between them."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BME: Float[Array, "B M E"]) -> Float[Array, "B M E"]:
        width = self.config.width
        hidden = MLP_FACTOR * self.config.width
        x_BME = LayerNorm(width, self.config.norm_eps, name="norm")(x_BME)
        up = Einsum(
            "BME,EF->BMF", (width, hidden), ("vis_embed", "vis_mlp"), dtype=self.dtype, name="up"
        )
        down = Einsum(
            "BMF,FE->BME", (hidden, width), ("vis_mlp", "vis_embed"), dtype=self.dtype, name="down"
        )
        hidden_BMF = nn.with_logical_constraint(up(x_BME), ("act_batch", "act_len", "act_mlp"))
        return down(jnp.square(nn.relu(hidden_BMF)))


class Layer(nn.Module):
    """A layer of the resampler: latents + attention(latents, patches), then x + mlp(x)."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, latents_BME: Float[Array, "B M E"], patches_BPE: Float[Array, "B P E"]
    ) -> tuple[Float[Array, "B M E"], None]:
        latents_BME += Attention(self.config, self.dtype, name="attn")(latents_BME, patches_BPE)
        latents_BME += MLP(self.config, self.dtype, name="mlp")(latents_BME)
        return nn.with_logical_constraint(latents_BME, ("act_batch", "act_len", "act_embed")), None


class Perceiver(Connector):
    """The Perceiver Resampler connector; its patches have no distribution over the vocabulary."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Defaults are Flamingo's."""

        num_latents: int = 64  # visual tokens of a tile
        num_layers: int = 6  # of the resampler

    @staticmethod
    def num_tokens(vision: VisionConfig, options: Options) -> int:
        """Returns the number of visual tokens of a tile, one for each latent."""
        return options.num_latents

    @nn.compact
    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "M D"]:
        """Returns `num_latents` visual tokens for each tile."""
        c = self.config
        vision = self.config.vision
        options = self.options
        # [N, E] -> [tiles, P, E]: from here on a latent sees the patches of its own tile alone.
        patches_BPE = features.astype(self.dtype).reshape(-1, vision.num_patches, vision.width)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("patch", "vis_embed"))
        latents_ME = self.param("latents", init, (options.num_latents, vision.width), jnp.float32)
        latents_BME = jnp.broadcast_to(
            latents_ME.astype(self.dtype), (len(patches_BPE), *latents_ME.shape)
        )
        latents_BME = nn.with_logical_constraint(latents_BME, ("act_batch", "act_len", "act_embed"))
        # The latents are the scan's carry; every layer reads the same patches.
        layers = scan_blocks(
            Layer, options.num_layers, c.remat, c.scan_unroll, in_axes=(nn.broadcast,)
        )
        latents_BME, _ = layers(vision, self.dtype, name="layers")(latents_BME, patches_BPE)
        latents_BME = LayerNorm(vision.width, vision.norm_eps, name="final_norm")(latents_BME)
        shape = (vision.width, c.llm.width)
        axes = ("vis_embed", "embed")
        tokens_BMD = Einsum("BME,ED->BMD", shape, axes, dtype=self.dtype, name="proj")(latents_BME)
        tokens_BMD = nn.with_logical_constraint(tokens_BMD, ("act_batch", "act_len", "act_embed"))
        # [tiles, M, D] -> [tiles M, D]
        return tokens_BMD.reshape(-1, c.llm.width)
