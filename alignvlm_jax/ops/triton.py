"""Self-attention of packed sequences by jax's Pallas kernel for NVIDIA GPUs, which Triton compiles;
each device of the mesh computes its own sequences and heads.

The kernel is jax.experimental.pallas.ops.gpu.attention, which has a backward pass of its own. It is
the only one of jax's public ones on a GPU that takes segments: jax.nn.dot_product_attention hands
cuDNN a bias [B, 1, T, T], and jax's Mosaic kernel knows neither segments nor, backward, a causal
mask. jax 0.12 still has it, and warns of tokamax in its place, whose public function takes a mask
[B, 1, T, T], too.
"""

import jax.numpy as jnp

from alignvlm_jax.ops import splash
from alignvlm_jax.shapes import Array, Float, Int

BLOCK = 128  # Tokens of a row are padded to a multiple of it.
BACKWARD_BLOCK = 64  # Queries, keys and two gradients of a block stay in shared memory.


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
    from jax.experimental.pallas.ops.gpu import attention as kernels

    length, head_dim = query.shape[1::2]
    padding = -length % BLOCK
    arrays = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value)]
    # Padding is a segment of its own, -1: no token sees it, and it sees itself, so that no softmax
    # is over nothing.
    arrays.append(jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=-1))
    blocks = kernels.BlockSizes(
        block_q=BLOCK,
        block_k=BLOCK,
        block_q_dkv=BACKWARD_BLOCK,
        block_kv_dkv=BACKWARD_BLOCK,
        block_q_dq=BACKWARD_BLOCK,
        block_kv_dq=BACKWARD_BLOCK,
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
        return kernels.mha(
            query,
            key,
            value,
            segment_ids,
            sm_scale=head_dim**-0.5,
            causal=causal,
            block_sizes=blocks,
            interpret=interpret,
        )

    return splash.over_mesh(local, arrays, kernel="triton")[:, :length]
