"""ALIGN (arXiv 2502.01341, equation 1): each patch becomes a weighted average of the LLM's text
embeddings.

    x = LN_1(F W1);  z = LN_2(x W2);  P = softmax_V(z);  out = P E_text

W1 [E, D] and W2 [D, V] have no bias; W2 starts as a copy of the LM head; LN_2 runs over the
vocabulary. The vocabulary axis is sharded over the mesh axis `tensor`, the patches over the others:
no device holds a whole [N, V] (`ops.vocab_average`).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from alignvlm_jax.config import ConnectorConfig, LLMConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models.connectors.base import (
    Connector,
    ConnectorOutput,
    PatchLabels,
    check_top_k,
)
from alignvlm_jax.models.decoder import lm_head
from alignvlm_jax.models.layers import Einsum, LayerNorm
from alignvlm_jax.ops.chunked import columns_per_chunk
from alignvlm_jax.ops.cross_entropy import sampled_cross_entropy, soft_cross_entropy
from alignvlm_jax.ops.vocab_average import Norm, VocabAverage, vocab_average, vocab_logits
from alignvlm_jax.shapes import Array, Float


class Align(Connector):
    """The ALIGN connector.

    In a model pruned to a vocabulary subset, the softmax is over the subset, and LN_2 over all.
    With `top_k` a visual token is the average over the likeliest entries, in a pruned model over
    those of the subset; the patch loss and `probabilities` stay over all.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(ConnectorConfig):
        """Defaults are the paper's; the others are there to see what each of its parts is for."""

        use_ln2: bool = True  # LN_2, on the logits
        ln2_gain_init: float = 1.0  # of LN_2's gain: 1 begins with almost flat distributions
        w2_init: Literal["lm_head", "random"] = "lm_head"  # what W2 starts as
        # whether the text table is trained through the visual tokens
        embed_grad: Literal["live", "stop"] = "live"
        # "linear": the span of the text embeddings, not their hull
        weights: Literal["softmax", "linear"] = "softmax"
        # likeliest entries that a visual token is the average of, renormalised; 0: all
        top_k: int = dataclasses.field(default=0, metadata={"at_least": 0})

    @staticmethod
    def init_from_llm(llm: dict[str, Any], options: Options) -> dict[str, Any]:
        """Returns W2 [D, V] as a copy of the LM head; nothing where the options initialise it at
        random."""
        return {"w2": {"kernel": lm_head(llm)}} if options.w2_init == "lm_head" else {}

    @staticmethod
    def check(vision: VisionConfig, llm: LLMConfig, options: Options) -> None:
        """Raises UserError where `top_k` is more than the vocabulary, or weights have no order."""
        check_top_k(options.top_k, llm.unpadded_vocab_size, "the language model's vocabulary")
        if options.top_k and options.weights == "linear":
            raise UserError(
                f"config.model.connector.top_k is {options.top_k} and weights 'linear', which may "
                "be negative: none is likeliest; set top_k=0 or weights='softmax'"
            )

    @classmethod
    def has_probabilities(cls, options: Options) -> bool:
        """Returns whether the weights are those of a softmax; linear weights may be negative."""
        return options.weights == "softmax"

    def setup(self) -> None:
        c = self.config
        eps = self.config.llm.norm_eps
        width = c.llm.width
        vocab = c.llm.vocab_size
        self.w1 = Einsum(
            "NE,ED->ND", (c.vision.width, width), ("vis_embed", "embed"), dtype=self.dtype
        )
        self.ln1 = LayerNorm(width, eps)
        self.w2 = Einsum("ND,DV->NV", (width, vocab), ("embed", "vocab"), dtype=self.dtype)
        if self.options.use_ln2:
            self.ln2 = LayerNorm(vocab, eps, scale_init=self.options.ln2_gain_init, axes=("vocab",))

    def probabilities(self, features: Float[Array, "N E"]) -> Float[Array, "N V"]:
        """Returns P in float32, never chunked: for a few pages."""
        x_ND, head = self._rows_and_head(features)
        logits_NV = vocab_logits(x_ND, head, self._norm(), self.config.llm.unpadded_vocab_size)
        # Left out before the softmax and not after it, so that what is kept sums to 1.
        kept_V = self.vocabulary_subset()
        return jax.nn.softmax(
            logits_NV if kept_V is None else jnp.where(kept_V, logits_NV, -jnp.inf), axis=-1
        )

    def __call__(
        self,
        features: Float[Array, "N E"],
        text_table: Float[Array, "V D"],
        labels: PatchLabels | None,
    ) -> ConnectorOutput:
        """Returns a visual token for each patch, and P's cross-entropy against the labels."""
        # The table is the LLM's own, live: without this, gradients reach the text embeddings
        # through the visual tokens as well.
        if self.options.embed_grad == "stop":
            text_table = jax.lax.stop_gradient(text_table)
        found = self._average(features, text_table, labels)
        if labels is None:
            return ConnectorOutput(found.average, self.no_loss(features))
        return ConnectorOutput(found.average, _cross_entropy(found, labels))

    def patch_nll(
        self, features: Float[Array, "N E"], labels: PatchLabels, num_sampled: int = 0
    ) -> Float[Array, "N"]:
        """Returns P's cross-entropy against the labels alone, half of the work over the
        vocabulary; with a sample, a small part of it."""
        if num_sampled:
            x_ND, head = self._rows_and_head(features)
            return sampled_cross_entropy(
                x_ND,
                head,
                self._norm(),
                *labels,
                self.config.llm.unpadded_vocab_size,
                num_sampled,
            )
        return _cross_entropy(self._average(features, None, labels), labels)

    def _average(
        self,
        features: Float[Array, "N E"],
        text_table: Float[Array, "V D"] | None,
        labels: PatchLabels | None,
    ) -> VocabAverage:
        c = self.config
        x_ND, head = self._rows_and_head(features)
        return vocab_average(
            x_ND,
            head,
            text_table,
            self._norm(),
            label_ids=labels and labels.ids,
            unpadded_vocab_size=c.llm.unpadded_vocab_size,
            subset=self.vocabulary_subset(),
            linear=self.options.weights == "linear",
            top_k=self.options.top_k,
            kept_ids=self.kept_entries(x_ND.shape[0]),
            chunk=columns_per_chunk(
                c.vocab_impl, c.chunk_size_mib, x_ND.shape[0], c.llm.vocab_size
            ),
        )

    def _rows_and_head(
        self, features: Float[Array, "N E"]
    ) -> tuple[Float[Array, "N D"], Float[Array, "D V"]]:
        """Returns x and W2 [D, V].

        W2 is read as a parameter and never called: `vocab_average` multiplies by it in chunks.
        """
        return self.ln1(self.w1(features)), self.w2.kernel

    def _norm(self) -> Norm | None:
        return Norm(self.ln2.scale, self.ln2.bias, self.ln2.eps) if self.options.use_ln2 else None


def _cross_entropy(found: VocabAverage, labels: PatchLabels) -> Float[Array, "N"]:
    return soft_cross_entropy(found.label_logits, found.log_sum_exp, labels.weights)
