"""FLOPs of a training step, by component of the model, counted in the program itself; what MFU is
measured against.

Counted are the matmuls (`dot_general`, and convolutions) in the jaxpr of the loss and of its
gradient by the trained parameters: traced over shapes, nothing is computed, and no module lists
what it multiplies. A multiplication and an addition are two. What frozen parameters save follows:
no gradient of theirs stands in the jaxpr, and what only fed such a gradient is dead code, which is
dropped as the compiler would.

MFU is of the work asked for (PaLM, arXiv 2204.02311, appendix B), so the program counted is the
plain one: attention over pairs of tokens of a packed sequence, in the place of kernels whose
matmuls no jaxpr shows, and the vocabulary whole. Of causal attention half counts, since half of all
pairs are masked and kernels leave them out; MaxText's MFU is of the same (maxtext_utils.py). What
is computed again in the backward pass does not count: JAX marks it by the name
"rematted_computation", under whatever `jax.checkpoint` it stands, the model's by `remat` or a
connector's own. Padding counts, since shapes are static: `padding` says how much of it there is.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from alignvlm_jax.config import Config, ModelConfig
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import hardware
from alignvlm_jax.plan.padding import Used
from alignvlm_jax.train import state, step
from alignvlm_jax.train.state import Params

COMPONENTS = ("vision", "connector", "llm", "loss")
RECOMPUTED = "rematted_computation"
# Components by the names that Flax gives to what their modules compute; the head's part of the loss
# is a method's.
_NAME = re.compile(r"(?:^|[/(])(?:(llm\.token_losses)|(vision|connector|llm)(?:\.\w+)?)(?=[/)]|$)")


def step_flops(config: Config, params: Params) -> dict[str, float]:
    """Returns FLOPs of a training step by component, for `params` (or their shapes) of which the
    stage trains some."""
    config = dataclasses.replace(config, model=_plain(config.model))
    model = vlm.VLM(config.model)
    batch = step.train_inputs(
        config.train, vlm.abstract_batch(config.model, config.data, config.train.batch_size)
    )
    # Without shardings, whose mesh need not be the one that is entered here.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    trainable, frozen = state.split(
        shapes, state.trainable_paths(config.train, config.stage, shapes)
    )

    def loss(trainable: Params, frozen: Params, batch: dict[str, Any]) -> jax.Array:
        params = state.merge(trainable, frozen)
        return step.whole_loss(model, config.train, params, batch, config.lora.alpha)

    # With its value: else the forward pass of what is recomputed would be dead code.
    return matmul_flops(jax.value_and_grad(loss), trainable, frozen, batch)


def connector_flops(config: ModelConfig, num_tiles: int) -> float:
    """Returns FLOPs of the connector alone, forward, over the patches of so many tiles."""
    config = _plain(config)
    module = connectors.get(config.connector.name)(config, jax.numpy.dtype(config.dtype))
    features = jax.ShapeDtypeStruct(
        (num_tiles * config.vision.num_patches, config.vision.width), config.dtype
    )
    table = jax.ShapeDtypeStruct((config.llm.vocab_size, config.llm.width), "float32")
    params = jax.eval_shape(
        lambda *args: module.init(jax.random.key(0), *args, None), features, table
    )
    flops = matmul_flops(
        lambda *args: module.apply(*args, None).tokens, sharding.unbox(params), features, table
    )
    return sum(flops.values())


def _plain(config: ModelConfig) -> ModelConfig:
    """The model that computes the same with nothing but plain matmuls; without padding in blocks of
    rows."""
    return dataclasses.replace(config, attention="plain", vocab_impl="plain")


def matmul_flops(fn: Callable, *args: Any) -> dict[str, float]:
    """Returns the FLOPs of the matmuls that a function of arrays (or their shapes) needs for its
    results, by component.

    What stands in no module of a component counts as the connector's: visual tokens that are made
    without it.
    """
    with flax.config.temp_flip_flag("profile", True):  # The names of modules.
        closed = jax.make_jaxpr(fn)(*args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    found: Counter[str] = Counter()
    for component, flops in _matmuls(live, "connector"):
        found[component] += flops
    return {component: float(found[component]) for component in COMPONENTS}


def _matmuls(jaxpr: Jaxpr, component: str) -> Iterator[tuple[str, int]]:
    """Component and FLOPs of every matmul below `jaxpr`, itself a part of `component`."""
    for equation in jaxpr.eqns:
        # Relative to what it stands in: an inner jaxpr begins with no name.
        name = str(equation.source_info.name_stack)
        if RECOMPUTED in name:
            continue
        here = component_of(name) or component
        if equation.primitive.name == "dot_general":
            # The decoder's only matmuls with two batch axes, of sequences and heads, are of queries
            # and keys, and of the weights of values: causal ones. Factors of LoRA have one, layers.
            is_causal = here == "llm" and len(equation.params["dimension_numbers"][1][0]) == 2
            yield here, _of_dot(equation) // (2 if is_causal else 1)
        elif equation.primitive.name == "conv_general_dilated":
            yield here, _of_convolution(equation)
        elif equation.primitive.name == "cond":
            # Of its branches one runs: the costliest stands for all.
            yield from max(
                (list(_matmuls(branch.jaxpr, here)) for branch in equation.params["branches"]),
                key=lambda found: sum(flops for _, flops in found),
            )
        else:
            times = _times(equation)
            for inner in _inner(equation):
                yield from ((part, times * flops) for part, flops in _matmuls(inner, here))


def component_of(scope: str) -> str | None:
    """Returns the component that the names of modules and functions lead to; None where they lead
    to none."""
    named = _NAME.search(scope)
    return ("loss" if named[1] else named[2]) if named else None


def _of_dot(equation: JaxprEqn) -> int:
    # Each entry of the result is a sum over the contracted axes.
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _of_convolution(equation: JaxprEqn) -> int:
    """Returns two FLOPs for each weight that an output sees; zeros put between inputs, for the
    gradient of strides, are none."""
    kernel = equation.invars[1].aval.shape
    out = equation.outvars[0].aval.shape
    out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    dilation = math.prod(equation.params["lhs_dilation"])
    return 2 * math.prod(out) * math.prod(kernel) // out_features // dilation


def _times(equation: JaxprEqn) -> int:
    """How often an equation's inner jaxprs run. A `while`, whose trips no jaxpr knows, counts once;
    no gradient goes back through one."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":  # Its jaxpr is of one shard.
        sizes = equation.params["mesh"].shape
        # The first name is that of jax 0.10, the second that of others.
        axes = equation.params.get("newly_manual_axes") or equation.params.get("manual_axes", ())
        return math.prod(sizes[axis] for axis in axes)
    return 1


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs that an equation holds: of jit, scan, while, remat, shard_map, custom
    derivatives."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def mfu_of(
    config: Config, params: Params, devices: Iterable[jax.Device]
) -> Callable[[float, Sequence[tuple[float, float]]], dict[str, float]]:
    """Returns a function of steps a second, and of the fractions of the tokens and of the tiles of
    batches that are no padding: {"mfu": fraction of what the devices could do, "useful_mfu": the
    same without what is spent on padding}; {} where the devices are not known."""
    peak = peak_flops(devices)
    if peak is None:
        return lambda steps_per_second, batches: {}
    by_component = step_flops(config, params)
    total = sum(by_component.values())

    def mfu(steps_per_second: float, batches: Sequence[tuple[float, float]]) -> dict[str, float]:
        whole = steps_per_second * total / peak
        useful = [Used(*one).of_flops(by_component) for one in batches]
        return {"mfu": whole, "useful_mfu": whole * sum(useful) / len(useful)}

    return mfu


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Returns the bfloat16 FLOP/s of all devices together; None where a kind is not known."""
    found = [hardware.chip_of(device) for device in devices]
    return None if None in found else sum(chip.tflops for chip in found) * 1e12
