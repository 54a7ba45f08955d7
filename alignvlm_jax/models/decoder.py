"""The decoder of Llama and of families of its shape: RMSNorm, grouped-query attention with rotary
positions, SwiGLU, tied or untied head.

Letters: `shapes.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from alignvlm_jax.config import LLMConfig
from alignvlm_jax.models.layers import (
    SOWN,
    Einsum,
    RMSNorm,
    apply_rope,
    rope_frequencies,
    scan_blocks,
)
from alignvlm_jax.ops.attention import attention, self_attention
from alignvlm_jax.ops.chunked import columns_per_chunk
from alignvlm_jax.ops.cross_entropy import TokenLosses, token_losses
from alignvlm_jax.shapes import Array, Bool, Float, Int

CACHE_AXES = ("layers", "act_batch", "act_heads", None, "act_len")
"""Logical axes of the keys and of the values in a cache."""


class Cache(NamedTuple):
    """Keys (rotated) and values of all layers, and the slot where the next token is written.

    The axis of slots is last, so that both matmuls of attention take a layer as it lies in memory;
    in any other order XLA on CPU would transpose it first.
    """

    keys: Float[Array, "L B K h S"]
    values: Float[Array, "L B K h S"]
    index: Int[Array, ""]

    def write(
        self, layer: Int[Array, ""], key: Float[Array, "B T K h"], value: Float[Array, "B T K h"]
    ) -> "Cache":
        """Returns the cache with T tokens of a layer written at the index, which is not moved."""

        def put(
            old: Float[Array, "L B K h S"], new_BTKh: Float[Array, "B T K h"]
        ) -> Float[Array, "L B K h S"]:
            # [B, T, K, h] -> [1, B, K, h, T]. Trap: where the tokens do not fit behind the index,
            # the update is moved until they do, and overwrites earlier slots without an error.
            new = new_BTKh.transpose(0, 2, 3, 1)[None].astype(old.dtype)
            return jax.lax.dynamic_update_slice(old, new, (layer, 0, 0, 0, self.index))

        return self._replace(keys=put(self.keys, key), values=put(self.values, value))

    def read(
        self, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]:
        """Returns the keys and values of a layer."""

        def get(array: Float[Array, "L B K h S"]) -> Float[Array, "B S K h"]:
            # [L, B, K, h, S] -> [B, S, K, h]
            return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False).transpose(0, 3, 1, 2)

        return get(self.keys), get(self.values)


class Attention(nn.Module):
    """Causal self-attention within segments; with a `mask`, over all slots of the cache that it
    admits."""

    config: LLMConfig
    dtype: DTypeLike
    kernel: str

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cache: Cache | None,
        layer: Int[Array, ""],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        mask: Bool[Array, "B T S"] | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        c = self.config
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        factor = c.rope_scaling.attention_factor
        if c.no_rope_every:
            # By a number that is scanned, since all layers are one program. At frequency 0 nothing
            # is rotated.
            rotates = (layer + 1) % c.no_rope_every != 0
            frequencies = jnp.where(rotates, frequencies, 0.0)
            factor = jnp.where(rotates, factor, 1.0)

        def project(name: str, num_heads: int, axis: str) -> Float[Array, "B T heads h"]:
            equation = "BTD,DHh->BTHh" if axis == "heads" else "BTD,DKh->BTKh"
            shape = (c.width, num_heads, c.head_dim)
            axes = ("embed", axis, "head_dim")
            linear = Einsum(equation, shape, axes, c.qkv_bias, dtype=self.dtype, name=name)
            y = linear(x_BTD)
            # Key-value heads are split along `tensor` as query heads are: it has to divide both.
            return nn.with_logical_constraint(y, ("act_batch", "act_len", "act_heads", None))

        def rotate(name: str, heads: Float[Array, "B T heads h"]) -> Float[Array, "B T heads h"]:
            # One scale [h] for all heads, before the rotation: after it the scale would weigh
            # mixtures of two channels, which differ from position to position.
            if c.qk_norm:
                # The norm's derivative needs its input, and so the projection.
                heads = checkpoint_name(heads, "qkv")
                heads = RMSNorm(c.norm_eps, name=f"{name}_norm")(heads)
                return apply_rope(heads, positions, frequencies, factor)
            return checkpoint_name(apply_rope(heads, positions, frequencies, factor), "qkv")

        query_BTHh = rotate("q", project("q", c.num_heads, "heads"))
        key_BTKh = rotate("k", project("k", c.num_kv_heads, "kv_heads"))
        value_BTKh = checkpoint_name(project("v", c.num_kv_heads, "kv_heads"), "qkv")
        if cache is not None:
            # Before the cache is read: the mask admits the slot of this very token.
            cache = cache.write(layer, key_BTKh, value_BTKh)
        # Without a mask the cache is empty but for the new tokens, so prefill attends to these
        # alone and may use a kernel.
        if mask is not None:
            mixed_BTHh = attention(query_BTHh, *cache.read(layer), mask)
        else:
            mixed_BTHh = self_attention(
                query_BTHh, key_BTKh, value_BTKh, segment_ids, causal=True, kernel=self.kernel
            )
        shape = (c.num_heads, c.head_dim, c.width)
        axes = ("heads", "head_dim", "embed")
        return Einsum("BTHh,HhD->BTD", shape, axes, dtype=self.dtype, name="o")(mixed_BTHh), cache


class MLP(nn.Module):
    """The SwiGLU MLP (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    config: LLMConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        shape = (c.width, c.mlp_width)
        gate_BTF, up_BTF = (
            checkpoint_name(
                Einsum("BTD,DF->BTF", shape, ("embed", "mlp"), dtype=self.dtype, name=name)(x_BTD),
                "mlp",
            )
            for name in ("gate", "up")
        )
        hidden_BTF = nn.with_logical_constraint(
            nn.silu(gate_BTF) * up_BTF, ("act_batch", "act_len", "act_mlp")
        )
        return Einsum(
            "BTF,FD->BTD", (c.mlp_width, c.width), ("mlp", "embed"), dtype=self.dtype, name="down"
        )(hidden_BTF)


class Block(nn.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)); with a cache, it also
    returns the cache that it wrote to."""

    config: LLMConfig
    dtype: DTypeLike
    kernel: str

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], Cache | None],
        layer: Int[Array, ""],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        mask: Bool[Array, "B T S"] | None,
    ) -> tuple[tuple[Float[Array, "B T D"], Cache | None], None]:
        x_BTD, cache = carry
        eps = self.config.norm_eps
        normed_BTD = RMSNorm(eps, name="attn_norm")(x_BTD)
        mixed_BTD, cache = Attention(self.config, self.dtype, self.kernel, name="attn")(
            normed_BTD, cache, layer, positions, segment_ids, mask
        )
        x_BTD += mixed_BTD
        x_BTD += MLP(self.config, self.dtype, name="mlp")(RMSNorm(eps, name="mlp_norm")(x_BTD))
        x_BTD = nn.with_logical_constraint(x_BTD, ("act_batch", "act_len", "act_embed"))
        # No part of the program unless the collection is asked for.
        self.sow(SOWN, "output", x_BTD)
        return (x_BTD, cache), None


class Embedding(nn.Module):
    """The text table, in a module of its own so that its parameter is llm/embed/table."""

    config: LLMConfig

    def setup(self) -> None:
        c = self.config
        # With this deviation a row is about 1 long, whatever the width.
        init = nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), ("vocab", "embed")
        )
        self.table = self.param("table", init, (c.vocab_size, c.width), jnp.float32)


class Llama(nn.Module):
    """The Llama decoder in three steps, `embed`, `__call__` and `logits`, since visual tokens come
    in between.

    Attributes:
      config: sizes.
      dtype: dtype of the computation.
      remat: policy name, see `layers.REMAT_POLICIES`.
      unroll: layers of the scan that are compiled in a row.
      attention: kernel name, see `ops.attention.self_attention`.
    """

    config: LLMConfig
    dtype: DTypeLike
    remat: str
    unroll: int = 1
    attention: str = "auto"

    def setup(self) -> None:
        c = self.config
        self.embedding = Embedding(c, name="embed")
        # The number of the layer is scanned; positions, segments and mask are the same for all.
        axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        blocks = scan_blocks(Block, c.num_layers, self.remat, self.unroll, in_axes=axes)
        self.blocks = blocks(c, self.dtype, self.attention)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            shape = (c.width, c.vocab_size)
            axes = ("embed", "vocab")
            self.head = Einsum("BTD,DV->BTV", shape, axes, dtype=self.dtype, out_dtype=jnp.float32)

    @property
    def table(self) -> Float[Array, "V D"]:
        """The text embeddings, live: gradients flow into them."""
        return self.embedding.table

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the text embeddings of tokens."""
        # The table is gathered over fsdp first: a lookup in a table sharded along both axes makes
        # XLA replicate the whole result.
        table_VD = nn.with_logical_constraint(self.table.astype(self.dtype), ("vocab", "act_embed"))
        return nn.with_logical_constraint(table_VD[tokens], ("act_batch", "act_len", "act_embed"))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        cache: Cache | None = None,
        mask: Bool[Array, "B T S"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns the last hidden states, after the final norm, and the cache with the T new tokens
        written at its index.

        Args:
          segment_ids: without a mask, a token sees itself and what stands before it in its own
            segment; with None, in its sequence.
          cache: where the new tokens are written. Without a mask it must be empty, since only the
            new tokens are seen.
          mask: admits slots of the cache, those of the new tokens included; for a few tokens at a
            time, since their logits over all slots are made.
        """
        if mask is not None and (cache is None or segment_ids is not None):
            raise ValueError(
                "a mask comes with the cache whose slots it admits, and without segments"
            )
        # The scan carries the whole cache: were each layer given its own and handed it back, all of
        # it would be copied.
        layers = jnp.arange(self.config.num_layers)
        x_BTD = x.astype(self.dtype)
        self.sow(SOWN, "input", x_BTD)
        (x_BTD, cache), _ = self.blocks((x_BTD, cache), layers, positions, segment_ids, mask)
        if cache is not None:
            # Once, after all layers: each of them writes the same tokens at the same slots.
            cache = cache._replace(index=cache.index + x.shape[1])
        return self.final_norm(x_BTD), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits over the vocabulary, sharded like it."""
        c = self.config
        if c.tie_embeddings:
            table_VD = self.table.astype(self.dtype)
            # Rounded to bfloat16, close logits would tie, and argmax would take the first of them.
            logits_BTV = jnp.einsum(
                "BTD,VD->BTV", hidden, table_VD, preferred_element_type=jnp.float32
            )
        else:
            logits_BTV = self.head(hidden)
        if c.padded_rows:
            logits_BTV = jnp.where(
                jnp.arange(c.vocab_size) < c.unpadded_vocab_size, logits_BTV, -jnp.inf
            )
        return nn.with_logical_constraint(logits_BTV, ("act_batch", "act_len", "act_vocab"))

    def token_losses(
        self,
        hidden: Float[Array, "B T D"],
        targets: Int[Array, "B T"],
        vocab_impl: str,
        chunk_size_mib: float,
    ) -> TokenLosses:
        """Returns the losses of predicting `targets`, with logits in chunks or all at once as
        `vocab_impl` and `chunk_size_mib` of `config.ModelConfig` say."""
        c = self.config
        # The float32 parameter is read, and the head not called: chunks multiply by it, one after
        # another.
        master = self.table if c.tie_embeddings else self.head.kernel
        return token_losses(
            hidden,
            master,
            targets,
            is_table=c.tie_embeddings,
            unpadded_vocab_size=c.unpadded_vocab_size,
            chunk=columns_per_chunk(vocab_impl, chunk_size_mib, targets.size, c.vocab_size),
        )

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """Returns a cache of zeros with `length` slots."""
        c = self.config
        zeros = jnp.zeros(
            (c.num_layers, batch_size, c.num_kv_heads, c.head_dim, length), self.dtype
        )
        zeros = nn.with_logical_constraint(zeros, CACHE_AXES)
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32))


def lm_head(llm: dict[str, Any]) -> Float[Array, "D V"]:
    """Returns a copy of the LM head in the LLM's parameters: the head's kernel, or the tied table
    transposed."""
    head = llm["head"]["kernel"] if "head" in llm else llm["embed"]["table"].T
    # A copy, not a second name for the same buffer: donating one must not take the other away.
    return jnp.copy(head)
