"""The connector of Ovis (arXiv 2405.20797): each patch becomes a weighted average of the rows of a
learned table.

    z = LN(F W);  P = softmax_K(z);  out = P E_visual

W [E, K] has no bias; E_visual [K, D] is the connector's own table, over a visual vocabulary of K
entries. LN on the logits, a table initialised from N(0, 1), and K = 131,072, about the size of its
LLMs' vocabularies, follow the release (AIDC-AI/Ovis v1.5, `SiglipVisualTokenizer.head` and
`VisualEmbedding`). Left out are the release's entries for the begin and end of an image, its
merging of patches, and its hard choices of an entry (gumbel, straight-through).
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ConnectorConfig, LLMConfig, VisionConfig
from alignvlm_jax.models.connectors.base import Connector, check_top_k
from alignvlm_jax.models.layers import Einsum, LayerNorm
from alignvlm_jax.ops.chunked import columns_per_chunk
from alignvlm_jax.ops.vocab_average import Norm, vocab_average
from alignvlm_jax.shapes import Array, Float


class Ovis(Connector):
    """The Ovis connector; its distribution is over entries without a spelling, so that
    `probabilities` is not defined."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Defaults are those of the release."""

        visual_vocab_size: int = 131072  # rows of the learned table
        # likeliest rows that a visual token is the average of, renormalised; 0: all
        top_k: int = dataclasses.field(default=0, metadata={"at_least": 0})

        def tensor_sizes(self) -> Mapping[str, int]:
            """Returns the table's number of rows, which are split along `tensor`."""
            return {"visual_vocab_size": self.visual_vocab_size}

    @staticmethod
    def check(vision: VisionConfig, llm: LLMConfig, options: Options) -> None:
        """Raises UserError where `top_k` is more than the learned table has rows."""
        check_top_k(options.top_k, options.visual_vocab_size, "the learned table")

    def setup(self) -> None:
        c = self.config
        size = self.options.visual_vocab_size
        # The logical axis is `vocab`, as of the LLM's tables: K is split along `tensor`, and no
        # device holds a whole [N, K].
        self.head = Einsum(
            "NE,EV->NV", (c.vision.width, size), ("vis_embed", "vocab"), dtype=self.dtype
        )
        self.norm = LayerNorm(size, c.llm.norm_eps, axes=("vocab",))
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.table = self.param("table", init, (size, c.llm.width), jnp.float32)

    def encode(self, features: Float[Array, "N E"]) -> Float[Array, "M D"]:
        """Returns a visual token for each patch."""
        c = self.config
        size = self.options.visual_vocab_size
        # What else comes back serves a loss against labels, which entries without a spelling have
        # not.
        tokens_ND, _, _ = vocab_average(
            features.astype(self.dtype),
            self.head.kernel,
            self.table,
            Norm(self.norm.scale, self.norm.bias, self.norm.eps),
            top_k=self.options.top_k,
            chunk=columns_per_chunk(c.vocab_impl, c.chunk_size_mib, features.shape[0], size),
        )
        return tokens_ND
