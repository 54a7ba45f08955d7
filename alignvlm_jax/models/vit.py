"""The SigLIP vision encoder (arXiv 2303.15343): patch convolution, learned positions, pre-norm
blocks, final norm.

Letters: `shapes.py`; B here counts tiles (sequences x tiles).
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.models.layers import Einsum, LayerNorm, scan_blocks
from alignvlm_jax.ops.attention import self_attention
from alignvlm_jax.shapes import Array, Float, UInt8


class Attention(nn.Module):
    """Full self-attention over the patches of a tile, with biases."""

    config: VisionConfig
    dtype: DTypeLike
    kernel: str

    @nn.compact
    def __call__(self, x_BPE: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        c = self.config
        head_dim = c.width // c.num_heads
        shape = (c.width, c.num_heads, head_dim)
        axes = ("vis_embed", "vis_heads", "head_dim")

        def project(name: str) -> Float[Array, "B P H h"]:
            linear = Einsum("BPE,EHh->BPHh", shape, axes, True, dtype=self.dtype, name=name)
            y = nn.with_logical_constraint(
                linear(x_BPE), ("act_batch", "act_len", "act_heads", None)
            )
            return checkpoint_name(y, "qkv")

        query, key, value = map(project, "qkv")
        # No segments: a tile is one, without padding.
        mixed = self_attention(query, key, value, None, causal=False, kernel=self.kernel)
        shape = (c.num_heads, head_dim, c.width)
        axes = ("vis_heads", "head_dim", "vis_embed")
        return Einsum("BPHh,HhE->BPE", shape, axes, use_bias=True, dtype=self.dtype, name="o")(
            mixed
        )


class MLP(nn.Module):
    """Two layers with GELU, exact or by its tanh approximation."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BPE: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        c = self.config
        up = Einsum(
            "BPE,EF->BPF",
            (c.width, c.mlp_width),
            ("vis_embed", "vis_mlp"),
            True,
            self.dtype,
            name="up",
        )
        down = Einsum(
            "BPF,FE->BPE",
            (c.mlp_width, c.width),
            ("vis_mlp", "vis_embed"),
            True,
            self.dtype,
            name="down",
        )
        hidden_BPF = checkpoint_name(up(x_BPE), "mlp")
        hidden_BPF = nn.with_logical_constraint(hidden_BPF, ("act_batch", "act_len", "act_mlp"))
        return down(nn.gelu(hidden_BPF, approximate=c.gelu == "tanh"))


class Block(nn.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: VisionConfig
    dtype: DTypeLike
    kernel: str

    @nn.compact
    def __call__(self, x_BPE: Float[Array, "B P E"], _: None) -> tuple[Float[Array, "B P E"], None]:
        c = self.config
        x_BPE += Attention(c, self.dtype, self.kernel, name="attn")(
            LayerNorm(c.width, c.norm_eps, name="attn_norm")(x_BPE)
        )
        x_BPE += MLP(c, self.dtype, name="mlp")(
            LayerNorm(c.width, c.norm_eps, name="mlp_norm")(x_BPE)
        )
        return nn.with_logical_constraint(x_BPE, ("act_batch", "act_len", "act_embed")), None


class Siglip(nn.Module):
    """The vision encoder, which turns tiles into patch features.

    Attributes:
      config: sizes.
      dtype: dtype of the computation.
      remat: policy name, see `layers.REMAT_POLICIES`.
      unroll: layers of the scan that are compiled in a row.
      attention: kernel name, see `ops.attention.self_attention`.
    """

    config: VisionConfig
    dtype: DTypeLike
    remat: str
    unroll: int = 1
    attention: str = "auto"

    @nn.compact
    def __call__(
        self, tiles: UInt8[Array, "B Y X C"] | Float[Array, "B Y X C"]
    ) -> Float[Array, "B P E"]:
        """Returns the last hidden states of the patches, row after row, after the final norm.

        Pixels are red, green and blue from 0 to 255: uint8, or floats, for derivatives by them.
        Mean and deviation of the config apply here.
        """
        c = self.config
        rows, columns = c.patch_grid
        # In float32: in bfloat16 the difference of two close numbers would lose most of its bits.
        mean = jnp.array(c.pixel_mean, jnp.float32)
        std = jnp.array(c.pixel_std, jnp.float32)
        pixels = (tiles.astype(jnp.float32) / 255 - mean) / std
        # A convolution whose stride is its kernel is a matmul over patches: [B, rows, height,
        # columns, width, C] to [B, P, height, width, C].
        patches = pixels.reshape(-1, rows, c.patch_height, columns, c.patch_width, tiles.shape[-1])
        patches = patches.swapaxes(2, 3).reshape(
            -1, c.num_patches, c.patch_height, c.patch_width, tiles.shape[-1]
        )
        x_BPE = Einsum(
            "BPyxC,yxCE->BPE",
            (c.patch_height, c.patch_width, tiles.shape[-1], c.width),
            (None, None, None, "vis_embed"),
            use_bias=True,
            dtype=self.dtype,
            name="patch_embed",
        )(patches)
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), ("patch", "vis_embed")
        )
        # [P, E], of a patch in its tile: where a tile lies on the page the encoder is not told.
        positions = self.param("positions", init, (c.num_patches, c.width), jnp.float32)
        x_BPE = nn.with_logical_constraint(
            x_BPE + positions.astype(self.dtype), ("act_batch", "act_len", "act_embed")
        )
        # The carry is all that a layer reads: None is broadcast where other blocks have inputs.
        blocks = scan_blocks(Block, c.num_layers, self.remat, self.unroll, in_axes=(nn.broadcast,))
        x_BPE, _ = blocks(c, self.dtype, self.attention, name="blocks")(x_BPE, None)
        return LayerNorm(c.width, c.norm_eps, name="final_norm")(x_BPE)
