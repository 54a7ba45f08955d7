"""ALIGN (arXiv 2502.01341, equation 1): each patch becomes a weighted average of the LLM's text embeddings.

    x = LN_1(F W1);  z = LN_2(x W2);  P = softmax_V(z);  out = P E_text

W1 [E, D] and W2 [D, V] have no bias; W2 starts as a copy of the LM head (`vlm.copy_head`); LN_2 runs over the
vocabulary. The vocabulary axis is sharded over the mesh axis `tensor`, the patches over the others: no device holds a
whole [N, V] (`ops.vocab_average`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.models.connectors.base import ConnectorOutput, PatchLabels, Product
from alignvlm_jax.models.layers import Einsum, LayerNorm
from alignvlm_jax.ops.chunked import Matrix, rows_per_block
from alignvlm_jax.ops.cross_entropy import soft_cross_entropy
from alignvlm_jax.ops.vocab_average import Norm, vocab_average, vocab_logits
from alignvlm_jax.shapes import Array, Float

KEPT_WORDS = ("pruning", "kept_words")
"""Collection and name of the words that may have weight, bool [V]; the softmax is over them alone, LN_2 over all."""


class Align(nn.Module):
    """The ALIGN connector. Attributes: the model's `config`, the computation's `dtype`."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        c, eps = self.config, self.config.llm.norm_eps
        width, vocab = c.llm.width, c.llm.vocab_size
        self.w1 = Einsum("NE,ED->ND", (c.vision.width, width), ("vis_embed", "embed"), dtype=self.dtype)
        self.ln1 = LayerNorm(width, eps)
        self.w2 = Einsum("ND,DV->NV", (width, vocab), ("embed", "vocab"), dtype=self.dtype)
        if c.connector.use_ln2:
            self.ln2 = LayerNorm(vocab, eps, scale_init=c.connector.ln2_gain_init, axes=("vocab",))

    def probabilities(self, features: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Returns P, each patch's distribution over the vocabulary, whole: for a few pages, to look at."""
        x_ND, head = self._rows_and_head(features)
        logits_NV = vocab_logits(x_ND, head, self._norm(), self.config.llm.num_words)
        kept_V = self._kept_words()
        return jax.nn.softmax(logits_NV if kept_V is None else jnp.where(kept_V, logits_NV, -jnp.inf), axis=-1)

    def __call__(
        self, features: Float[Array, "N E"], text_table: Float[Array, "V D"], labels: PatchLabels | None
    ) -> ConnectorOutput:
        """Returns a visual token for each patch, and P's cross-entropy against the labels."""
        c = self.config
        if c.connector.embed_grad == "stop":
            text_table = jax.lax.stop_gradient(text_table)
        x_ND, head = self._rows_and_head(features)
        tokens, label_logits, log_sum_exp = vocab_average(
            x_ND,
            head,
            Matrix.of(text_table, self.dtype),
            self._norm(),
            label_ids=labels and labels.ids,
            num_words=c.llm.num_words,
            subset=self._kept_words(),
            linear=c.connector.weights == "linear",
            block=rows_per_block(c.vocab_form, c.vocab_block_mib, x_ND.shape[0], c.llm.vocab_size),
        )
        if labels is None:
            return ConnectorOutput(tokens, jnp.zeros(features.shape[0], jnp.float32))
        return ConnectorOutput(tokens, soft_cross_entropy(label_logits, log_sum_exp, labels.weights))

    @staticmethod
    def products(config: ModelConfig, patches: int) -> list[Product]:
        """Returns what `train.flops` counts."""
        vision_width, width, vocab = config.vision.width, config.llm.width, config.llm.vocab_size
        average = Product(2 * patches * vocab * width, "llm/embed/")
        if config.connector.embed_grad == "stop":
            average = dataclasses.replace(average, prefix="no parameter")
        return [
            Product(2 * patches * vision_width * width, "connector/w1/"),
            Product(2 * patches * width * vocab, "connector/w2/"),
            average,
        ]

    def _rows_and_head(self, features: Array) -> tuple[Array, Matrix]:
        return self.ln1(self.w1(features)), Matrix.of(self.w2.kernel, self.dtype)

    def _kept_words(self) -> Array | None:
        """Bool [V], of who prunes a trained model: the only variable that is no parameter, and absent by default."""
        return self.get_variable(*KEPT_WORDS)

    def _norm(self) -> Norm | None:
        return Norm(self.ln2.scale, self.ln2.bias, self.ln2.eps) if self.config.connector.use_ln2 else None
