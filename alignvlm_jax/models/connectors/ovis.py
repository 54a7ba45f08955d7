"""The connector of Ovis (arXiv 2405.20797): each patch becomes a weighted average of a learned
table.

    z = LN(F W);  P = softmax_K(z);  out = P E_visual

W [E, K] has no bias; E_visual [K, D] is a table of the connector's own, over a visual vocabulary of
K words. From the release (AIDC-AI/Ovis v1.5, `SiglipVisualTokenizer.head` and `VisualEmbedding`)
come LN on the logits, a table drawn from N(0, 1), and K = 131,072, about as many as its LLMs have
words. Left out are its words that mark where an image begins and ends, its merging of patches, and
its hard choices of a word (gumbel, straight-through).
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ConnectorConfig
from alignvlm_jax.models.connectors.base import Connector
from alignvlm_jax.models.layers import Einsum, LayerNorm
from alignvlm_jax.ops.chunked import Matrix, rows_per_chunk
from alignvlm_jax.ops.vocab_average import Norm, vocab_average
from alignvlm_jax.shapes import Array, Float


class Ovis(Connector):
    """Its distribution is over no vocabulary that could be read."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Defaults are those of the release."""

        visual_vocab_size: int = 131072  # rows of the learned table

        def tensor_sizes(self) -> Mapping[str, int]:
            """Returns the table's rows."""
            return {"visual_vocab_size": self.visual_vocab_size}

    def setup(self) -> None:
        c = self.config
        size = self.options.visual_vocab_size
        self.head = Einsum(
            "NE,EV->NV", (c.vision.width, size), ("vis_embed", "vocab"), dtype=self.dtype
        )
        self.norm = LayerNorm(size, c.llm.norm_eps, axes=("vocab",))
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.table = self.param("table", init, (size, c.llm.width), jnp.float32)

    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "tokens D"]:
        """Returns a visual token for each patch."""
        c = self.config
        size = self.options.visual_vocab_size
        tokens_ND, _, _ = vocab_average(
            features.astype(self.dtype),
            Matrix.of(self.head.kernel, self.dtype),
            Matrix.of(self.table, self.dtype),
            Norm(self.norm.scale, self.norm.bias, self.norm.eps),
            chunk=rows_per_chunk(c.vocab_impl, c.chunk_size_mib, features.shape[0], size),
        )
        return tokens_ND
