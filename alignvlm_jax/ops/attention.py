"""Attention with grouped key-value heads: under a mask that the caller gives, or over packed
sequences by a kernel."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from alignvlm_jax.errors import UserError
from alignvlm_jax.ops.pallas import splash_attention, triton_attention
from alignvlm_jax.ops.vocab_shards import num_shards
from alignvlm_jax.shapes import Array, Bool, Float, Int

Shaped = Array | jax.ShapeDtypeStruct  # a choice of kernel needs no values

CHUNK_SIZE_MIB = 64.0
"""MiB of float32 logits that XLA's attention may hold on one device; above it, logits are made for
one chunk of the queries at a time."""
PARTS = 4
"""Parts of a sequence whose queries XLA's causal attention lets meet the keys up to their end: with
4 three eighths of the logits are never made."""
PART_LENGTH = 64
"""Tokens of the shortest part; matmuls of fewer rows would cost more than they save."""
HALF = (jnp.bfloat16, jnp.float16)  # What tensor cores multiply without rounding it.


def attention(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B S K h"],
    value: Float[Array, "B S K h"],
    mask: Bool[Array, "#B T S"] | None = None,
) -> Float[Array, "B T H h"]:
    """Returns softmax(query key^T / sqrt(h)) value, softmax in float32; query head i reads key head
    i // (H / K).

    Args:
      query, key, value: of one dtype, which is that of the output.
      mask: whether a token may see a key, the same for all heads; None admits every key.
    """
    # A mask [B, 1, T, S] broadcasts over heads; jax itself groups the query heads of a key head.
    return jax.nn.dot_product_attention(
        query, key, value, mask=None if mask is None else mask[:, None]
    )


def self_attention(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B T K h"],
    value: Float[Array, "B T K h"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    causal: bool,
    kernel: str,
) -> Float[Array, "B T H h"]:
    """Returns attention within the segments of packed sequences, in the query's dtype: the result
    of `attention` under the mask of the segments.

    Args:
      segment_ids: a token sees its own segment only, and padding (segment 0) is a segment of its
        own; with None, a sequence is one segment.
      causal: a token sees nothing after itself.
      kernel: `config.model.attention`. "xla" makes logits [B, H, T, T], where causal in PARTS
        without most of those that are masked, if they are at most CHUNK_SIZE_MIB on a device, else
        those of one chunk of queries at a time. "splash" is the Pallas kernel for TPU (interpreted
        on CPU, for tests), "cudnn" the kernel of NVIDIA's library, from Ampere on; neither stores
        logits, but cuDNN takes segments as a bias [B, 1, T, T]. "triton" is the Pallas kernel for
        NVIDIA GPUs, which takes them as they are (interpreted on CPU, too); without segments it
        means "auto". "auto" takes the kernel that the devices of the mesh have, and "xla" where
        cuDNN refuses these arrays. Without a mesh every choice means "xla": there only shapes are
        asked for, maybe on another machine. "plain", which no config may choose, makes all logits
        [B, H, T, T] at once, so that `plan.flops` can count them.

    Raises:
      UserError: the mesh has no such kernel, or the kernel does not take these sizes.
    """
    kernel = _resolve(kernel, query, segment_ids)
    # Whatever computes the output names it for remat policies: splash and `_on_cpu` what their
    # backward passes need of it.
    if kernel == "splash":
        return splash_attention(
            query, key, value, segment_ids, causal=causal, interpret=mesh_platform() == "cpu"
        )
    if kernel == "triton":
        return triton_attention(
            query, key, value, segment_ids, causal=causal, interpret=mesh_platform() == "cpu"
        )
    if kernel == "xla":
        return _by_xla(query, key, value, segment_ids, causal)
    # cuDNN's kernel knows no segments: they come in as a bias [B, 1, T, T]. The causal mask stays
    # out of it, since the kernel knows that one and skips the upper triangle.
    mask = None if segment_ids is None else same_segment(segment_ids, segment_ids)[:, None]
    implementation = "cudnn" if kernel == "cudnn" else "xla"
    mixed = jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )
    return checkpoint_name(mixed, "attention")


def _by_xla(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B T K h"],
    value: Float[Array, "B T K h"],
    segment_ids: Int[Array, "B T"] | None,
    causal: bool,
) -> Float[Array, "B T H h"]:
    """Returns `attention` under the mask of the segments, part after part of the queries.

    A query meets all keys that it may see at once, so its softmax is exact and needs no running
    maximum. Parts and chunks are cut along T alone: batch and heads stay sharded as they are.
    """
    length = query.shape[1]
    count = max(1, min(PARTS, length // PART_LENGTH)) if causal else 1
    bounds = [math.ceil(length * i / count) for i in range(count + 1)]
    # What stands after a part is seen by none of its queries.
    parts = [(start, end, end if causal else length) for start, end in itertools.pairwise(bounds)]
    fitting = _fitting_logits(query.shape[0], query.shape[2])
    is_whole = sum((end - start) * num_keys for start, end, num_keys in parts) <= fitting

    def cut(ids: Int[Array, "B T"] | None, *span: int) -> Int[Array, "B n"] | None:
        return None if ids is None else ids[:, slice(*span)]

    mixed = []
    for start, end, num_keys in parts:
        keys = _Keys(key[:, :num_keys], value[:, :num_keys], cut(segment_ids, num_keys), causal)
        chunk = _queries_per_chunk(end - start, num_keys, fitting)
        mix = keys.mix if is_whole else functools.partial(_chunked, keys, chunk)
        index = jnp.arange(start, end)[None]
        mixed.append(mix(query[:, start:end], index, cut(segment_ids, start, end)))
    return mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, axis=1)


class _Keys(NamedTuple):
    """The keys and values, of the first S tokens of a sequence, that some queries meet.

    Causal, in one part, the segments [1 1 2 2] have the mask   1 0 0 0
                                                                1 1 0 0
                                                                0 0 1 0
                                                                0 0 1 1
    Image tokens are like any other: they see what stands before them and are seen by what
    follows. Padding (segment 0) is a segment of its own, so that no row of the mask is empty and
    its softmax stays finite.
    """

    key: Float[Array, "B S K h"]
    value: Float[Array, "B S K h"]
    segment_ids: Int[Array, "B S"] | None
    causal: bool

    def mix(
        self,
        query: Float[Array, "B n H h"],
        index: Int[Array, "1 n"],
        segment_ids: Int[Array, "B n"] | None,
    ) -> Float[Array, "B n H h"]:
        """Returns the attention of queries at these places of the sequence, in these segments."""
        masks = []
        if segment_ids is not None:
            masks.append(same_segment(segment_ids, self.segment_ids))
        if self.causal:
            # [1, n, S] is the same for all sequences.
            masks.append(index[:, :, None] >= jnp.arange(self.key.shape[1]))
        mask = functools.reduce(jnp.logical_and, masks) if masks else None
        if mesh_platform() == "cpu":
            return _on_cpu(query, self.key, self.value, mask)
        return checkpoint_name(attention(query, self.key, self.value, mask), "attention")


def _fitting_logits(batch: int, heads: int) -> int:
    """Returns how many logits of each row and head have CHUNK_SIZE_MIB on a device."""
    # Sizes on one device; the ceiling is what the partitioner pads an uneven axis to.
    rows, heads = (
        math.ceil(n / num_shards(axis)) for n, axis in ((batch, "act_batch"), (heads, "act_heads"))
    )
    return int(CHUNK_SIZE_MIB * 2**20 / (4 * rows * heads))


def _queries_per_chunk(num_queries: int, num_keys: int, fitting: int) -> int:
    """Returns how many queries have at most `fitting` logits, in chunks of nearly equal size: those
    that pad the last one cost as much as others."""
    most = max(1, fitting // num_keys)
    return math.ceil(num_queries / math.ceil(num_queries / most))


def _chunked(
    keys: _Keys,
    chunk: int,
    query: Float[Array, "B n H h"],
    index: Int[Array, "1 n"],
    segment_ids: Int[Array, "B n"] | None,
) -> Float[Array, "B n H h"]:
    """Returns `keys.mix`, computed for `chunk` queries at a time; the backward pass computes the
    logits of a chunk again."""
    length = query.shape[1]
    count = math.ceil(length / chunk)

    def split(x: Array, mode: str) -> Array:
        """Returns [B, n, ...] as [chunks, B, chunk, ...], n padded by `mode`."""
        x = jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)), mode=mode)
        return x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)

    # Queries that pad the last chunk take index and segment of the last real query, so that each
    # sees a key; what they yield is cut off below.
    parts = (
        split(query, "constant"),
        split(index, "edge"),
        None if segment_ids is None else split(segment_ids, "edge"),
    )
    # Without the checkpoint, the scan would save the logits of every chunk for the backward pass:
    # [B, H, n, S] after all.
    mixed = jax.lax.map(jax.checkpoint(lambda part: keys.mix(*part), prevent_cse=False), parts)
    # [chunks, B, chunk, H, h] -> [B, chunks, chunk, H, h] -> [B, n, H, h]
    mixed = mixed.swapaxes(0, 1).reshape(query.shape[0], count * chunk, *query.shape[2:])
    return checkpoint_name(mixed[:, :length], "attention")


# XLA compiles a matmul for CPU as [n, summed] x [summed, columns], and copies an operand that lies
# otherwise: of jax's attention and its derivative these are arrays [B, H, T, S], the largest there
# are. Here only arrays [B, T, H, h] change their order.
@jax.custom_vjp
def _on_cpu(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B S K h"],
    value: Float[Array, "B S K h"],
    mask: Bool[Array, "n T S"] | None,
) -> Float[Array, "B T H h"]:
    """Returns `attention` up to rounding, with a backward pass of its own."""
    return _on_cpu_forward(query, key, value, mask)[0]


def _on_cpu_forward(
    query: Float[Array, "B T H h"],
    key: Float[Array, "B S K h"],
    value: Float[Array, "B S K h"],
    mask: Bool[Array, "n T S"] | None,
) -> tuple[Float[Array, "B T H h"], tuple[Float[Array, "..."], ...]]:
    length, head_dim = query.shape[1::2]
    # In float32 only the result is rounded; a bfloat16 factor would be rounded as well.
    scaled = (query.astype(jnp.float32) * head_dim**-0.5).astype(query.dtype)
    # [B, K, G T, h]: the queries of the G heads that read a key head are rows of one matmul.
    query_BKnh = _heads_first(scaled, key.shape[2])
    key_BKSh, value_BKSh = (x.swapaxes(1, 2) for x in (key, value))
    logits_BKnS = _matmul("BKnh,BKSh->BKnS", query_BKnh, key_BKSh)
    if mask is not None:
        grouped = logits_BKnS.reshape(*logits_BKnS.shape[:2], -1, *mask.shape[1:])
        # Finite, so that a query that sees no key has equal weights, and not NaN.
        lowest = 0.7 * jnp.finfo(jnp.float32).min
        logits_BKnS = jnp.where(mask[:, None, None], grouped, lowest).reshape(logits_BKnS.shape)
    weights_BKnS = jax.nn.softmax(logits_BKnS, axis=-1).astype(value.dtype)
    mixed_BKnh = _matmul("BKnS,BKSh->BKnh", weights_BKnS, value_BKSh).astype(value.dtype)
    mixed_BKnh = checkpoint_name(mixed_BKnh, "attention")
    saved = query_BKnh, key_BKSh, value_BKSh, weights_BKnS, mixed_BKnh
    return _heads_last(mixed_BKnh, length), saved


def _on_cpu_backward(
    saved: tuple[Float[Array, "..."], ...], dout: Float[Array, "B T H h"]
) -> tuple[Float[Array, "B T H h"], Float[Array, "B S K h"], Float[Array, "B S K h"], None]:
    query_BKnh, key_BKSh, value_BKSh, weights_BKnS, mixed_BKnh = saved
    length, head_dim = dout.shape[1::2]
    dout_BKnh = _heads_first(dout, key_BKSh.shape[1])
    # Transposed, [h, S] and not [S, h], so that what is copied is [n, h] and not [n, S].
    dvalue_BKhS = _matmul("BKnh,BKnS->BKhS", dout_BKnh, weights_BKnS)
    dweights_BKnS = _matmul("BKnh,BKSh->BKnS", dout_BKnh, value_BKSh)
    # The sum over keys of weights x their gradients is that over h of the result x its gradient.
    inner_BKn1 = (dout_BKnh.astype(jnp.float32) * mixed_BKnh).sum(-1, keepdims=True)
    # Masked weights are 0, and so are the gradients of their logits.
    dlogits_BKnS = (weights_BKnS * (dweights_BKnS - inner_BKn1)).astype(dout.dtype)
    dquery_BKnh = _matmul("BKnS,BKSh->BKnh", dlogits_BKnS, key_BKSh)
    dkey_BKhS = _matmul("BKnh,BKnS->BKhS", query_BKnh, dlogits_BKnS)
    dquery = _heads_last((dquery_BKnh * head_dim**-0.5).astype(dout.dtype), length)
    # [B, K, h, S] -> [B, S, K, h]
    dkey, dvalue = (x.astype(dout.dtype).transpose(0, 3, 1, 2) for x in (dkey_BKhS, dvalue_BKhS))
    return dquery, dkey, dvalue, None


_on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


def _matmul(equation: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the einsum in float32; XLA for CPU would multiply in float32, too, where the result
    is to be bfloat16."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _heads_first(x: Float[Array, "B T H h"], num_kv_heads: int) -> Float[Array, "B K n h"]:
    """Returns [B, K, G T, h]: of each key head, the rows of the heads that read it."""
    batch, length, _, head_dim = x.shape
    grouped = x.reshape(batch, length, num_kv_heads, -1, head_dim)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)


def _heads_last(x: Float[Array, "B K n h"], length: int) -> Float[Array, "B T H h"]:
    """The inverse of `_heads_first`."""
    batch, num_kv_heads, _, head_dim = x.shape
    grouped = x.reshape(batch, num_kv_heads, -1, length, head_dim)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, head_dim)


def mesh_platform() -> str | None:
    """Returns the platform of the mesh entered, "cpu", "gpu" or "tpu"; None without a mesh.

    jax.default_backend() would be wrong: a TPU's program may be compiled on a CPU host. The
    abstract mesh is all that is known inside jit, and is part of the key of jit's cache.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def _resolve(kernel: str, query: Shaped, segment_ids: Shaped | None) -> str:
    """Returns the kernel that runs: "plain", "xla", "splash", "triton" or "cudnn"; raises UserError
    where the one chosen cannot."""
    platform = mesh_platform()
    if kernel == "plain":
        return kernel
    if platform is None or kernel == "xla":
        return "xla"
    if kernel == "auto" or (kernel == "triton" and segment_ids is None):
        if platform == "gpu":
            return "xla" if _refused_by_cudnn(query) else "cudnn"
        return "splash" if platform == "tpu" else "xla"
    # On CPU "splash" is interpreted: tests run the TPU's path there.
    if kernel == "splash" and platform == "gpu":
        raise UserError(
            "config.model.attention 'splash' is for TPU and the mesh is of gpu; use 'cudnn' or "
            "'auto'"
        )
    refused = ""
    if kernel in ("cudnn", "triton") and platform != "gpu":
        # On CPU "triton" is interpreted, as "splash" is.
        is_interpreted = kernel == "triton" and platform == "cpu"
        refused = "" if is_interpreted else f"the mesh is of {platform}"
    elif kernel == "cudnn":
        refused = _refused_by_cudnn(query)
    elif kernel == "triton" and query.dtype not in HALF:
        # It would multiply in tf32.
        refused = f"it computes in bfloat16 or float16, not in {query.dtype}"
    if refused:
        raise UserError(f"config.model.attention '{kernel}' does not apply: {refused}; use 'auto'")
    return kernel


def _refused_by_cudnn(query: Shaped) -> str:
    """Returns why cuDNN's kernel does not take these arrays, "" if it does.

    The conditions are those under which jax raises: "auto" must fall back before that.
    """
    length = query.shape[1]
    head_dim = query.shape[3]
    if query.dtype not in HALF:
        return f"it computes in bfloat16 or float16, not in {query.dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"head dimension {head_dim} must be a multiple of 8 up to 128"
    # Meant for those with a bias; but jax takes every backward pass for one with a bias.
    if length % 2:
        return f"{length} is an odd number of tokens"
    return ""


def same_segment(query_ids: Int[Array, "B n"], key_ids: Int[Array, "B S"]) -> Bool[Array, "B n S"]:
    """Returns which queries and keys are tokens of the same segment, by their segment ids."""
    return query_ids[:, :, None] == key_ids[:, None, :]
