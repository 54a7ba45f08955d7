"""Self-attention by jax's Pallas kernels, for TPU and for NVIDIA GPUs; each device of the mesh
computes its own sequences and heads.

The kernels, which have backward passes of their own, are
jax.experimental.pallas.ops.tpu.splash_attention, and jax.experimental.pallas.ops.gpu.attention,
which Triton compiles. That is the only public one on a GPU that takes segments:
jax.nn.dot_product_attention hands cuDNN a bias [B, 1, T, T], and jax's Mosaic kernel knows neither
segments nor, backward, a causal mask. jax 0.12 still has it, and warns of tokamax in its place,
whose public function takes a mask [B, 1, T, T], too.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from alignvlm_jax.errors import UserError
from alignvlm_jax.shapes import Array, Float, Int

LANES = 128  # of a TPU's vector registers: blocks are multiples of it
MAX_BLOCK = 512  # float32 logits of two such blocks are 1 MiB of the 16 MiB that a kernel has
TRITON_BLOCK = 128  # Tokens of a row are padded to a multiple of it.
TRITON_BACKWARD_BLOCK = 64  # Queries, keys and two gradients of a block stay in shared memory.


def splash_attention(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B T K h"],
    value: Float[Array, "B T K h"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    causal: bool,
    interpret: bool,
) -> Float[Array, "B T H h"]:
    """Returns softmax(query key^T / sqrt(h)) value within segments, in the query's dtype; no array
    is of size [T, T].

    Args:
      query, key, value: query head i reads key head i // (H / K).
      segment_ids: None: every sequence is one segment.
      causal: a token sees nothing after itself.
      interpret: computes with jax what the kernel would on a TPU, for tests.

    Raises:
      UserError: sequences or heads do not divide over the mesh.
    """
    batch, length, _, head_dim = query.shape
    padding = block_size(length) * num_blocks(length) - length
    # Without segments, tokens would see the padding where attention is not causal.
    if segment_ids is None and padding:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    # The kernel applies no scale. In float32 only the result is rounded; a bfloat16 factor would be
    # rounded as well.
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    arrays = _padded((scaled, key, value), segment_ids, padding)

    def local(
        query: Float[Array, "B T H h"],
        key: Float[Array, "B T K h"],
        value: Float[Array, "B T K h"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T H h"]:
        # A kernel's mask arrays are constants of the trace under way, and no other trace may have
        # them: so it is made here, and not cached.
        kernel = _make_kernel(query.shape[2], query.shape[1], causal, interpret)
        ids = None if segment_ids is None else kernels.SegmentIds(segment_ids, segment_ids)
        # The kernel takes one sequence, [H, T, h]; vmap adds the batch.
        heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)

    return over_mesh(local, arrays, kernel="splash")[:, :length]


def triton_attention(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B T K h"],
    value: Float[Array, "B T K h"],
    segment_ids: Int[Array, "B T"],
    *,
    causal: bool,
    interpret: bool,
) -> Float[Array, "B T H h"]:
    """Returns softmax(query key^T / sqrt(h)) value within segments, in the query's dtype; no array
    is of size [T, T].

    Args:
      query, key, value: query head i reads key head i // (H / K).
      segment_ids: int32; a token sees its own segment only.
      causal: a token sees nothing after itself.
      interpret: computes with jax what the kernel would on a GPU, for tests.

    Raises:
      UserError: sequences or heads do not divide over the mesh.
    """
    # Late: only a GPU needs it, and newer jax warns as it is imported.
    from jax.experimental.pallas.ops.gpu import attention as triton

    length, head_dim = query.shape[1::2]
    padding = -length % TRITON_BLOCK
    arrays = _padded((query, key, value), segment_ids, padding)
    blocks = triton.BlockSizes(
        block_q=TRITON_BLOCK,
        block_k=TRITON_BLOCK,
        block_q_dkv=TRITON_BACKWARD_BLOCK,
        block_kv_dkv=TRITON_BACKWARD_BLOCK,
        block_q_dq=TRITON_BACKWARD_BLOCK,
        block_kv_dq=TRITON_BACKWARD_BLOCK,
    )

    def local(
        query: Float[Array, "B T H h"],
        key: Float[Array, "B T K h"],
        value: Float[Array, "B T K h"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T H h"]:
        # The kernel knows no groups: each query head gets a key head of its own.
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
        return triton.mha(
            query,
            key,
            value,
            segment_ids,
            sm_scale=head_dim**-0.5,
            causal=causal,
            block_sizes=blocks,
            interpret=interpret,
        )

    return over_mesh(local, arrays, kernel="triton")[:, :length]


def num_blocks(length: int) -> int:
    """Returns the number of blocks, of at most MAX_BLOCK tokens, that a sequence is cut into."""
    return math.ceil(length / MAX_BLOCK)


def block_size(length: int) -> int:
    """Returns the tokens of a block, a multiple of LANES; blocks are as equal as that allows, so
    that little is padded: 600 tokens are two blocks of 384, not of 512."""
    return LANES * math.ceil(length / num_blocks(length) / LANES)


def _make_kernel(
    num_heads: int, length: int, causal: bool, interpret: bool
) -> kernels.SplashAttentionKernel:
    # Lazy masks: the kernel skips blocks in which no query sees a key, and computes the mask of the
    # others from indices, so that no [T, T] is stored.
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    chunk = block_size(length)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=kernels.BlockSizes(
            block_q=chunk,
            block_kv=chunk,
            block_q_dkv=chunk,
            block_kv_dkv=chunk,
            block_q_dq=chunk,
            block_kv_dq=chunk,
        ),
        head_shards=1,
        q_seq_shards=1,
        # Its output and the log-sum-exp of its logits: with both saved, it is not run again.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _padded(
    heads: tuple[Float[Array, "..."], ...], segment_ids: Int[Array, "B T"] | None, padding: int
) -> list[Array]:
    """Returns arrays [B, T, heads, h] and, where there are any, segment ids with so many tokens
    more."""
    arrays = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in heads]
    if segment_ids is not None:
        # Padding is a segment of its own, -1: no token sees it, and it sees itself, so that no
        # softmax is over nothing.
        arrays.append(jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1))
    return arrays


def over_mesh(local: Callable[..., Array], arrays: list[Array], *, kernel: str) -> Array:
    """Returns local(*arrays), where each device computes its own sequences and heads.

    The partitioner cannot look into a kernel, and would have every device compute the whole batch.

    Raises:
      UserError: sequences or heads do not divide over the mesh; `kernel` is named in it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*arrays)
    spec = nn.logical_to_mesh_axes(("act_batch", "act_len", "act_heads", None))
    query, key = arrays[:2]
    for what, size, axes in (
        ("rows", query.shape[0], spec[0]),
        ("heads", query.shape[2], spec[2]),
        ("key-value heads", key.shape[2], spec[2]),
    ):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        num_shards = math.prod(mesh.shape[axis] for axis in axes)
        if size % num_shards:
            raise UserError(
                f"{kernel} attention: {size} {what} do not divide over mesh axis "
                f"{' x '.join(axes)} of {num_shards}; change config.mesh or set "
                "config.model.attention to 'xla'"
            )
    # Arrays are [B, T, H, h]; segment ids [B, T].
    specs = tuple(spec if x.ndim == 4 else PartitionSpec(*spec[:2]) for x in arrays)
    # Without the check of varying axes: a kernel's outputs do not say over which axes they differ.
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)
