"""The C-Abstractor of HoneyBee (arXiv 2312.06742): convolutions and pooling that reduce the number
of tokens and keep the locality of patches.

    learned positions, ResNet blocks, adaptive average pooling to fewer tokens, ResNet blocks,
    Linear-SiLU-Linear

It follows the release (khanrc/honeybee, `CAbstractor`), whose blocks are timm's RegNet bottlenecks:
1 x 1, depthwise 3 x 3, squeeze and excitation by a quarter, 1 x 1, a LayerNorm over channels after
each convolution, SiLU. The blocks' width is the encoder's, as in the release; the grid need not be
square. Positions are initialised as in the release (truncated normal, 0.02). Kernels, which the
release draws from N(0, 0.02), are initialised like all linear maps here: at the release's width of
1,024 that is N(0, 0.03).

Letters: `shapes.py`; B here counts tiles, y and x rows and columns of patches or of pooled tokens.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from alignvlm_jax.config import ConnectorConfig, LLMConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.connectors.base import Connector
from alignvlm_jax.models.layers import Einsum, LayerNorm, scan_blocks
from alignvlm_jax.shapes import Array, Float

NORM_EPS = 1e-6


class Depthwise(nn.Module):
    """A 3 x 3 convolution of each channel by itself, with zeros beyond the tile's border.

    It is computed as nine shifted multiplications: a single channel leaves a matrix unit idle, and
    the partitioner splits elementwise operations along every axis.
    """

    width: int

    @nn.compact
    def __call__(self, x_ByxF: Float[Array, "B y x F"]) -> Float[Array, "B y x F"]:
        init = nn.with_logical_partitioning(nn.initializers.normal(1 / 3), (None, None, "vis_mlp"))
        # N(0, 1 / fan_in), where the fan-in of one channel is the nine taps.
        kernel = self.param("kernel", init, (3, 3, self.width), jnp.float32).astype(x_ByxF.dtype)
        _, rows, columns, _ = x_ByxF.shape
        padded = jnp.pad(x_ByxF, ((0, 0), (1, 1), (1, 1), (0, 0)))  # [B, y + 2, x + 2, F]
        return sum(
            kernel[i, j] * padded[:, i : i + rows, j : j + columns] for i, j in np.ndindex(3, 3)
        )


class Gate(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507): each channel is multiplied by a gate in (0, 1),
    computed from the averages of all channels over the tile."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_ByxF: Float[Array, "B y x F"]) -> Float[Array, "B y x F"]:
        # The squeezed axis r is small, and not sharded.
        squeezed = round(self.width / 4)
        down = Einsum(
            "BF,Fr->Br", (self.width, squeezed), ("vis_mlp", None), True, self.dtype, name="down"
        )
        up = Einsum(
            "Br,rF->BF", (squeezed, self.width), (None, "vis_mlp"), True, self.dtype, name="up"
        )
        # Averages [B, F] -> [B, r] -> gates [B, F] -> [B, 1, 1, F]: one for all places of a tile.
        return x_ByxF * nn.sigmoid(up(nn.silu(down(x_ByxF.mean((1, 2))))))[:, None, None]


class Block(nn.Module):
    """A ResNet block: silu(x + convolutions(x))."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_ByxE: Float[Array, "B y x E"]) -> tuple[Float[Array, "B y x E"], None]:
        shape = (self.width, self.width)
        hidden_axes = ("act_batch", None, None, "act_mlp")
        conv1 = Einsum(
            "ByxE,EF->ByxF", shape, ("vis_embed", "vis_mlp"), dtype=self.dtype, name="conv1"
        )
        conv3 = Einsum(
            "ByxF,FE->ByxE", shape, ("vis_mlp", "vis_embed"), dtype=self.dtype, name="conv3"
        )
        norm1, norm2 = (
            LayerNorm(self.width, NORM_EPS, axes=("vis_mlp",), name=name)
            for name in ("norm1", "norm2")
        )
        hidden_ByxF = nn.with_logical_constraint(nn.silu(norm1(conv1(x_ByxE))), hidden_axes)
        hidden_ByxF = nn.silu(norm2(Depthwise(self.width, name="conv2")(hidden_ByxF)))
        hidden_ByxF = nn.with_logical_constraint(
            Gate(self.width, self.dtype, name="gate")(hidden_ByxF), hidden_axes
        )
        x_ByxE = nn.silu(x_ByxE + LayerNorm(self.width, NORM_EPS, name="norm3")(conv3(hidden_ByxF)))
        return nn.with_logical_constraint(x_ByxE, ("act_batch", None, None, "act_embed")), None


class CAbstractor(Connector):
    """The C-Abstractor connector; its patches have no distribution over the vocabulary."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Defaults are those of the release."""

        pooled_rows: int = 12  # the grid of visual tokens of a tile
        pooled_columns: int = 12  # and the columns of it
        num_blocks: int = 3  # before the pooling, and as many after it

    @staticmethod
    def num_tokens(vision: VisionConfig, options: Options) -> int:
        """Returns the number of cells of the pooled grid."""
        return options.pooled_rows * options.pooled_columns

    @staticmethod
    def check(vision: VisionConfig, llm: LLMConfig, options: Options) -> None:
        """Raises UserError where the pooled grid is finer than that of the patches."""
        for name, size in zip(("rows", "columns"), vision.patch_grid, strict=True):
            pooled = getattr(options, f"pooled_{name}")
            if pooled > size:
                raise UserError(
                    f"config.model.connector.pooled_{name} is {pooled} and a tile has {size} "
                    f"{name} of patches; at most {size}"
                )

    @nn.compact
    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "M D"]:
        """Returns `pooled_rows` x `pooled_columns` visual tokens for each tile, row after row."""
        c = self.config
        options = self.options
        (rows, columns) = self.config.vision.patch_grid
        vision_width = c.vision.width
        width = c.llm.width
        init = nn.with_logical_partitioning(
            nn.initializers.truncated_normal(0.02), ("patch", "vis_embed")
        )
        positions = self.param("positions", init, (c.vision.num_patches, vision_width), jnp.float32)
        # Patches come row after row, so a reshape restores the grid: [tiles, rows, columns, E].
        x_ByxE = features.astype(self.dtype).reshape(-1, rows, columns, vision_width)
        x_ByxE += positions.astype(self.dtype).reshape(rows, columns, vision_width)
        x_ByxE = nn.with_logical_constraint(x_ByxE, ("act_batch", None, None, "act_embed"))
        blocks = scan_blocks(Block, options.num_blocks, c.remat, c.scan_unroll, in_axes=())
        x_ByxE, _ = blocks(vision_width, self.dtype, name="before")(x_ByxE)
        # Pooling is separable: columns first, then rows, each a matmul with fixed weights. Window
        # reductions would do only where the bins divide the grid.
        x_ByxE = jnp.einsum(
            "ByxE,Xx->ByXE", x_ByxE, _pooling(columns, options.pooled_columns).astype(self.dtype)
        )
        x_ByxE = jnp.einsum(
            "ByxE,Yy->BYxE", x_ByxE, _pooling(rows, options.pooled_rows).astype(self.dtype)
        )
        x_ByxE, _ = blocks(vision_width, self.dtype, name="after")(x_ByxE)
        up = Einsum(
            "ByxE,ED->ByxD",
            (vision_width, width),
            ("vis_embed", "embed"),
            True,
            self.dtype,
            name="fc1",
        )
        # Both axes are the LLM's width: only the first may be sharded by it.
        down = Einsum(
            "ByxD,Dd->Byxd", (width, width), ("embed", None), True, self.dtype, name="fc2"
        )
        tokens = nn.with_logical_constraint(
            down(nn.silu(up(x_ByxE))), ("act_batch", None, None, "act_embed")
        )
        return tokens.reshape(-1, width)


def _pooling(size: int, bins: int) -> Float[np.ndarray, "bins size"]:
    """Returns the weights of adaptive average pooling, as PyTorch defines it.

    Bin i is the mean from floor(i size / bins) up to ceil((i + 1) size / bins), exclusive: bins
    overlap where `bins` does not divide `size`.
    """
    index = np.arange(bins)[:, None]
    places = np.arange(size)
    # -(-a // b) is a / b rounded up. Of 3 places and 2 bins: [[1/2, 1/2, 0], [0, 1/2, 1/2]].
    inside = (places >= index * size // bins) & (places < -(-(index + 1) * size // bins))
    return inside / inside.sum(1, keepdims=True)
