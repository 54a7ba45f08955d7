"""Building blocks of both towers: projections, norms, rotary positions, remat policies.

Letters: `shapes.py`.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from alignvlm_jax.config import SAVED_BY_NAME, RopeScaling
from alignvlm_jax.ops.attention import mesh_platform
from alignvlm_jax.ops.cross_entropy import project
from alignvlm_jax.ops.layer_norm import layer_norm
from alignvlm_jax.shapes import Array, Float, Int

# What the backward pass finds saved of a layer: everything, only its input, or also the results of
# matmuls with weights (attention's own matmuls have batch dimensions, and are computed again), or
# what `checkpoint_name` names in the towers' layers, and in the attention kernel for TPU.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        # A matmul within a derivative of our own is none that the policy sees.
        jax.checkpoint_policies.save_only_these_names("linear"),
    ),
    **{
        names: jax.checkpoint_policies.save_only_these_names(*names.split("+"))
        for names in SAVED_BY_NAME
    },
}

SOWN = "intermediates"
"""Collection of what modules sow; Flax leaves this one out when it initialises parameters."""

# Logical axes of parameters that are gathered for use. Left to itself, the partitioner sometimes
# keeps a kernel's shards and makes one narrow matmul of each, for which its inputs go round.
GATHERED = ("embed", "vis_embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(
    kernel: Float[Array, "..."],
    axes: tuple[str | None, ...],
    dtype: DTypeLike,
    stored_dtype: DTypeLike,
) -> Float[Array, "..."]:
    """Returns the kernel in the dtype of the computation, whole along `GATHERED`; its gradient is
    scattered again. The constraint's own gradient would have the constraint's sharding, and be
    summed whole on every device."""
    whole = tuple(None if axis in GATHERED else axis for axis in axes)
    # The cast comes first: bfloat16 is half of what a gather sends.
    return nn.with_logical_constraint(kernel.astype(dtype), whole)


def _gathered_forward(
    kernel: Float[Array, "..."], *static: Any
) -> tuple[Float[Array, "..."], None]:
    return _gathered(kernel, *static), None


def _gathered_backward(
    axes: tuple[str | None, ...],
    dtype: DTypeLike,
    stored_dtype: DTypeLike,
    saved: None,
    dkernel: Float[Array, "..."],
) -> tuple[Float[Array, "..."]]:
    del dtype, saved
    # In the dtype of the computation, as the partial sums of the devices are: a sum in float32
    # would send twice the bytes.
    return (nn.with_logical_constraint(dkernel, axes).astype(stored_dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


# Like the mesh, it is entered: every projection of every module would have to be handed it.
_reduce_dtype = contextvars.ContextVar("reduce_dtype", default="bfloat16")


@contextlib.contextmanager
def gradients_reduced_in(dtype: str) -> Iterator[None]:
    """Traces the gradients of kernels so that devices sum them in `dtype`; see
    `config.TrainConfig`."""
    before = _reduce_dtype.set(dtype)
    try:
        yield
    finally:
        _reduce_dtype.reset(before)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _linear_with_float32_sums(
    inputs: Float[Array, "..."],
    kernel: Float[Array, "..."],
    equation: str,
    axes: tuple[str | None, ...],
    dtype: DTypeLike,
    out_dtype: DTypeLike | None,
) -> Float[Array, "..."]:
    """Returns `linear` of the gathered kernel; of its gradient each device's part is float32 when
    the parts are added."""
    return linear(equation, inputs, _gathered(kernel, axes, dtype, kernel.dtype), out_dtype)


def _float32_sums_forward(
    inputs: Float[Array, "..."], kernel: Float[Array, "..."], *static: Any
) -> tuple[Float[Array, "..."], tuple[Float[Array, "..."], Float[Array, "..."]]]:
    # The kernel as it is stored, in shards: it is gathered again.
    return _linear_with_float32_sums(inputs, kernel, *static), (inputs, kernel)


def _float32_sums_backward(
    equation: str,
    axes: tuple[str | None, ...],
    dtype: DTypeLike,
    out_dtype: DTypeLike | None,
    saved: tuple[Float[Array, "..."], Float[Array, "..."]],
    dout: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    inputs, kernel = saved
    whole = _gathered(kernel, axes, dtype, kernel.dtype)
    (dinputs,) = jax.vjp(lambda x: linear(equation, x, whole, out_dtype), inputs)[1](dout)
    operands, out = equation.split("->")
    rows, letters = operands.split(",")
    dkernel = jnp.einsum(
        f"{rows},{out}->{letters}", inputs, dout, preferred_element_type=jnp.float32
    )
    return dinputs, nn.with_logical_constraint(dkernel, axes).astype(kernel.dtype)


_linear_with_float32_sums.defvjp(_float32_sums_forward, _float32_sums_backward)


class Einsum(nn.Module):
    """A linear map `inputs, kernel -> outputs` given by an einsum, its kernel kept at its final
    rank.

    nn.DenseGeneral creates a flat kernel first, which a logical spec of higher rank rejects under
    jax.set_mesh.

    Attributes:
      equation: for example "BTD,DHh->BTHh".
      shape: shape of the kernel, which is stored in float32.
      axes: logical axis of each kernel dimension.
      use_bias: adds a bias over the kernel dimensions that the output keeps.
      dtype: dtype of the computation.
      out_dtype: dtype of the outputs, if another: logits asked for in float32 must not be rounded
        to bfloat16 on their way.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    out_dtype: DTypeLike | None = None

    def setup(self) -> None:
        # Of "BTHh,HhD->BTD" these are "HhD", the letters of the kernel, and "BTD".
        letters, out = self.equation.split(",")[1].split("->")
        kept = [i for i, letter in enumerate(letters) if letter in out]
        summed = [i for i in range(len(letters)) if i not in kept]
        # The fan-in is the size of all axes that are summed over: for "BTHh,HhD->BTD" it is H * h.
        # By default jax would take the last two axes, whatever the equation.
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=summed, out_axis=kept
        )
        self.kernel = self.param(
            "kernel", nn.with_logical_partitioning(init, self.axes), self.shape, jnp.float32
        )
        if self.use_bias:
            zeros = nn.with_logical_partitioning(
                nn.initializers.zeros, tuple(self.axes[i] for i in kept)
            )
            # Of "BTD,DHh->BTHh" it is [H, h]: the axes of the kernel that the output keeps.
            self.bias = self.param("bias", zeros, tuple(self.shape[i] for i in kept), jnp.float32)

    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        # The kernel is cast at each use: the parameter, and its gradient, stay float32.
        inputs = inputs.astype(self.dtype)
        if self.dtype == jnp.bfloat16 and _reduce_dtype.get() == "float32":
            outputs = _linear_with_float32_sums(
                inputs, self.kernel, self.equation, self.axes, self.dtype, self.out_dtype
            )
            outputs = checkpoint_name(outputs, "linear")
        else:
            kernel = _gathered(self.kernel, self.axes, self.dtype, self.kernel.dtype)
            outputs = linear(self.equation, inputs, kernel, self.out_dtype)
        return outputs + self.bias.astype(outputs.dtype) if self.use_bias else outputs


def linear(
    equation: str,
    inputs: Float[Array, "..."],
    kernel: Float[Array, "..."],
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Returns the einsum `inputs, kernel -> outputs`; on CPU as a matmul of two matrices, where it
    is one.

    The kernel's gradient sums over B and T. XLA for CPU makes that one matmul, too, but copies and
    transposes the gradients of the outputs for it unless the rows are one axis [B T] already: 1.7
    times the time of the matmul. On TPU a reshape might be a copy, and there is nothing to gain.
    """
    einsum = functools.partial(jnp.einsum, preferred_element_type=out_dtype)
    operands, out = equation.split("->")
    rows, letters = operands.split(",")
    summed = "".join(letter for letter in letters if letter not in out)
    kept = letters.removeprefix(summed)
    is_matmul = summed and rows.endswith(summed) and rows.removesuffix(summed) + kept == out
    if not is_matmul or mesh_platform() != "cpu":
        return einsum(equation, inputs, kernel)
    # Of "BTHh,HhD->BTD": [B T, H h] by [H h, D].
    flat = kernel.reshape(math.prod(kernel.shape[: len(summed)]), -1)
    rows_NE = inputs.reshape(-1, flat.shape[0])
    if inputs.dtype == kernel.dtype == jnp.bfloat16:
        # Summed in float32 it is what CPUs have an instruction for, twice as fast as float32; XLA
        # would take both operands to float32 for a result in bfloat16.
        outputs = project("NE,ED->ND", rows_NE, flat).astype(out_dtype or jnp.bfloat16)
        outputs = checkpoint_name(outputs, "linear")
    else:
        outputs = einsum("NE,ED->ND", rows_NE, flat)
    return outputs.reshape(*inputs.shape[: -len(summed)], *kernel.shape[len(summed) :])


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32, returned in the input's
    dtype."""

    size: int
    eps: float
    scale_init: float = 1.0
    axes: tuple[str | None, ...] = (None,)

    def setup(self) -> None:
        ones = nn.with_logical_partitioning(nn.initializers.constant(self.scale_init), self.axes)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes)
        self.scale = self.param("scale", ones, (self.size,), jnp.float32)
        self.bias = self.param("bias", zeros, (self.size,), jnp.float32)

    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        return layer_norm(x, self.scale, self.bias, self.eps).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) over the last axis, computed in float32,
    returned in the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... n"]) -> Float[Array, "... n"]:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        variance = jnp.square(x32).mean(-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(variance + self.eps) * scale).astype(x.dtype)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling
) -> Float[Array, "{head_dim}//2"]:
    """Returns the angular frequency of each pair of channels, in radians a position.

    With a factor other than 1 they are scaled: wavelengths beyond original_length /
    low_freq_factor are stretched by the factor, those under original_length / high_freq_factor
    kept, those between blended; of the linear type all are stretched.
    """
    # Wavelengths are 2 pi / frequency; `turns` is how often a pair turns within original_length.
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling.factor == 1.0:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    if scaling.type == "yarn":
        keep = _yarn_keep(head_dim, theta, scaling)
    else:
        turns = scaling.original_length * frequencies / (2 * math.pi)
        # A line through 0 at low_freq_factor turns and 1 at high_freq_factor; cut off beyond both.
        keep = turns - scaling.low_freq_factor
        keep /= scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def _yarn_keep(head_dim: int, theta: float, scaling: RopeScaling) -> Float[Array, "{head_dim}//2"]:
    """YaRN's line, in the number of the pair and not in its turns, between whole numbers."""

    def pair_of(turns: float) -> float:
        """The pair, counted in fractions, that turns so often within original_length."""
        wavelengths = scaling.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(theta))

    first = max(math.floor(pair_of(scaling.high_freq_factor)), 0)
    last = min(math.ceil(pair_of(scaling.low_freq_factor)), head_dim - 1)
    # Where both are one pair, the line is a step.
    return 1 - (jnp.arange(head_dim // 2) - first) / ((last - first) or 0.001)


def apply_rope(
    x: Float[Array, "B T H h"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, "h//2"],
    factor: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B T H h"]:
    """Returns x with its channel pairs (i, i + h/2) rotated by position x frequency (RoPE, arXiv
    2104.09864) and multiplied by `factor`, computed in float32: bfloat16 would round position 257
    to 256."""
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [B, T, 1, h/2]
    sin = jnp.sin(angles) * factor
    cos = jnp.cos(angles) * factor
    if mesh_platform() == "cpu":
        # Else XLA fuses a sine into whatever reads it, and computes it for each element of x.
        sin, cos = jax.lax.optimization_barrier((sin, cos))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, H, h/2] each
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


def scan_blocks(
    block: type[nn.Module], num_layers: int, remat: str, unroll: int, in_axes: tuple
) -> type[nn.Module]:
    """Returns `block` stacked `num_layers` times: a scan whose parameters have a leading "layers"
    axis, so that one layer is compiled whatever the depth.

    The block maps (x, *inputs) to (x, per-layer output).

    Args:
      block: module of one layer.
      num_layers: length of the scan.
      remat: policy name in `REMAT_POLICIES`.
      unroll: layers compiled in a row.
      in_axes: for each input, whether it is scanned (0) or shared (nn.broadcast).
    """
    # Within a scan no barrier against CSE is needed; it would only keep XLA from fusing.
    if REMAT_POLICIES[remat] is not None:
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        # What a block sows is kept only where `apply` is told to (`vlm.hidden_states`).
        variable_axes={"params": 0, SOWN: 0},
        # A key for each layer: with one for all, every layer would start from the same numbers.
        split_rngs={"params": True},
        length=num_layers,
        in_axes=in_axes,
        metadata_params={nn.PARTITION_NAME: "layers"},
        unroll=min(unroll, num_layers),
    )
