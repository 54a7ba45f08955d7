"""ALIGN (arXiv 2502.01341, equation 1): each patch becomes a weighted average of the LLM's text embeddings.

    x = LN_1(F W1);  z = LN_2(x W2);  P = softmax_V(z);  out = P E_text

W1 [E, D] and W2 [D, V] have no bias; W2 starts as a copy of the LM head (`vlm.copy_head`); LN_2 runs over the
vocabulary. The vocabulary axis is sharded over the mesh axis `tensor`: no device holds a whole [N, V].
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.models.connectors.base import ConnectorOutput, PatchLabels
from alignvlm_jax.models.layers import Einsum, LayerNorm
from alignvlm_jax.ops.cross_entropy import soft_cross_entropy
from alignvlm_jax.shapes import Array, Float


class Align(nn.Module):
    """The ALIGN connector. Attributes: the model's `config`, the computation's `dtype`."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        c, eps = self.config, self.config.llm.norm_eps
        width, vocab = c.llm.width, c.llm.vocab_size
        self.w1 = Einsum("NE,ED->ND", (c.vision.width, width), ("vis_embed", "embed"), dtype=self.dtype)
        self.ln1 = LayerNorm(eps)
        self.w2 = Einsum("ND,DV->NV", (width, vocab), ("embed", "vocab"), dtype=self.dtype, out_dtype=jnp.float32)
        if c.connector.use_ln2:
            self.ln2 = LayerNorm(eps, scale_init=c.connector.ln2_gain_init, axes=("vocab",))

    def vocabulary_logits(self, features: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Returns z in float32: the softmax over a large vocabulary needs more than bfloat16's 8 bits."""
        logits_NV = self.w2(self.ln1(self.w1(features)))
        logits_NV = nn.with_logical_constraint(logits_NV, ("act_batch", "act_vocab"))
        return self.ln2(logits_NV) if self.config.connector.use_ln2 else logits_NV

    def probabilities(self, features: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Returns P, each patch's distribution over the vocabulary."""
        return jax.nn.softmax(self.vocabulary_logits(features), axis=-1)

    def __call__(
        self, features: Float[Array, "N E"], text_table: Float[Array, "V D"], labels: PatchLabels | None
    ) -> ConnectorOutput:
        """Returns a visual token for each patch, and P's cross-entropy against the labels."""
        if self.config.connector.embed_grad == "stop":
            text_table = jax.lax.stop_gradient(text_table)
        logits_NV = self.vocabulary_logits(features)
        weights_NV = jax.nn.softmax(logits_NV, axis=-1).astype(self.dtype)
        tokens_ND = jnp.einsum("NV,VD->ND", weights_NV, text_table.astype(self.dtype))
        tokens_ND = nn.with_logical_constraint(tokens_ND, ("act_batch", "act_embed"))
        if labels is None:
            return ConnectorOutput(tokens_ND, jnp.zeros(features.shape[0], jnp.float32))
        return ConnectorOutput(tokens_ND, soft_cross_entropy(logits_NV, labels.ids, labels.weights))
