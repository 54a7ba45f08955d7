"""LoRA (arXiv 2106.09685): kernels that stay as they are and get a product of two narrow matrices
added, which alone are trained.

It is a wrapper of the parameters, of which the models know nothing. The factors of the kernel at a
path p stand at lora/p/a and lora/p/b. What a model is given is `merged`: the parameters without the
factors, each kernel that has some replaced by kernel + alpha / rank * a b.

Factors keep the kernel's axes and their logical names: of [L, D, H, h], which maps D to H h, a is
[L, D, r] and b [L, r, H, h]. So they are sharded as the kernel is.
"""

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh
from jax.typing import DTypeLike

from alignvlm_jax.config import LoraConfig, ModelConfig
from alignvlm_jax.errors import UserError, nearest
from alignvlm_jax.models import vlm
from alignvlm_jax.models.layers import Einsum
from alignvlm_jax.parallel import sharding
from alignvlm_jax.shapes import Array, Float

COMPONENT = "lora"
OFF = LoraConfig()


class Layout(NamedTuple):
    """Which axes of a kernel a linear map sums over.

    Attributes:
      letters: of the kernel in the map's einsum, such as "DHh"; stacked layers stand before them.
      summed: those that are summed over, such as "D".
      kept: those that the output has, such as "Hh".
    """

    letters: str
    summed: str
    kept: str

    @property
    def rank(self) -> str:
        """A letter for the axis between the factors."""
        return next(letter for letter in "rzq" if letter not in self.letters)

    @property
    def product(self) -> str:
        """The einsum of a and b, such as "...Dr,...rHh->...DHh"."""
        r = self.rank
        return f"...{self.summed}{r},...{r}{self.kept}->...{self.letters}"

    def sizes(self, kernel: tuple[int, ...]) -> tuple[int, int]:
        """Returns how many inputs and outputs the map of a kernel of that shape has."""
        a, b = self.factors(kernel)
        num_layers = len(kernel) - len(self.letters)
        return math.prod(a[num_layers:-1]), math.prod(b[num_layers + 1 :])

    def factors(self, kernel: tuple) -> tuple[tuple, tuple]:
        """Returns what a and b have of a kernel's axes, given one value an axis, such as its size;
        None stands for the rank."""
        layers = kernel[: len(kernel) - len(self.letters)]
        by_letter = dict(zip(self.letters, kernel[len(layers) :], strict=True))
        a = (*layers, *(by_letter[letter] for letter in self.summed), None)
        b = (*layers, None, *(by_letter[letter] for letter in self.kept))
        return a, b


@functools.cache
def layouts(model: ModelConfig) -> Mapping[str, Layout]:
    """Returns the layout of every kernel of a linear map by its path, as the model uses it; nothing
    is computed."""
    found = {}

    def note(method: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Einsum):
            # Of "BTHh,HhD->BTD" the kernel is "HhD", of which the output keeps "D".
            letters, out = context.module.equation.split(",")[1].split("->")
            kept = "".join(letter for letter in letters if letter in out)
            summed = "".join(letter for letter in letters if letter not in out)
            found["/".join((*context.module.path, "kernel"))] = Layout(letters, summed, kept)
        return method(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda: vlm.init_params(vlm.VLM(model), jax.random.key(0)))
    return found


def check_targets(model: ModelConfig, rank: int, targets: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where one of the parameters that `config.lora.targets` matches, shapes by
    path, is no kernel of a linear map, or where none of them can have a product of that rank."""
    known = layouts(model)
    largest = {}
    for path, shape in sorted(targets.items()):
        if path not in known:
            raise UserError(
                f"config.lora.targets matches {path}, which is no kernel of a linear "
                f"map{nearest(path, known)}"
            )
        num_inputs, num_outputs = known[path].sizes(shape)
        largest[path] = min(num_inputs, num_outputs)
    widest = max(largest, key=largest.get)
    # Of some it may be more: keys and values are often narrower than what else gets factors.
    if rank > largest[widest]:
        raise UserError(
            f"config.lora.rank is {rank}, and no target's product can have more than "
            f"{largest[widest]}, of {widest}; it must be at most that"
        )


def add(params: Mapping[str, Any], paths: Collection[str], rank: int, model: ModelConfig) -> Any:
    """Returns the parameters with factors of zeros for the kernels at `paths`; where a kernel is
    boxed with its logical axes, so are its factors."""
    leaves = traverse_util.flatten_dict(params, sep="/")
    for path in sorted(paths):
        kernel = leaves[path]
        layout = layouts(model)[path]
        shapes = layout.factors(nn.meta.unbox(kernel).shape)
        names = layout.factors(kernel.names) if isinstance(kernel, nn.LogicallyPartitioned) else ()
        for i, factor in enumerate(factors(path)):
            zeros = jnp.zeros([size or rank for size in shapes[i]], jnp.float32)
            leaves[factor] = nn.LogicallyPartitioned(zeros, names[i]) if names else zeros
    return traverse_util.unflatten_dict(leaves, sep="/")


def init(
    shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, rng: jax.Array
) -> dict[str, Float[Array, "..."]]:
    """Returns initialised factors, float32, of the shapes given by path: a as PEFT has it, uniform
    within 1 / sqrt(inputs), and b zeros, so that the model starts as it was."""
    drawn = {}
    for path, shape in shapes.items():
        kernel, name = kernel_of(path)
        if name == "b":
            drawn[path] = jnp.zeros(shape, jnp.float32)
            continue
        layout = layouts(model)[kernel]
        bound = math.prod(shape[-1 - len(layout.summed) : -1]) ** -0.5
        # By the path and not by its place: other targets leave these numbers as they are.
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        drawn[path] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return drawn


def kernel_of(path: str) -> tuple[str, str]:
    """Returns the path of the kernel that a factor at `path` is of, and its name, "a" or "b"."""
    kernel, name = path.removeprefix(f"{COMPONENT}/").rsplit("/", 1)
    return kernel, name


def kernels(paths: Collection[str]) -> set[str]:
    """Returns the paths of the kernels that have factors among the parameters at `paths`."""
    return {kernel_of(path)[0] for path in paths if is_factor(path)}


def factors(kernel: str) -> tuple[str, str]:
    """Returns the paths of the factors of the kernel at a path."""
    return f"{COMPONENT}/{kernel}/a", f"{COMPONENT}/{kernel}/b"


def is_factor(path: str) -> bool:
    """Whether a parameter is a factor."""
    return path.startswith(f"{COMPONENT}/")


def abstract_factors(
    stored: Mapping[str, jax.ShapeDtypeStruct], kernels: Collection[str], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns by path the shapes of a checkpoint's factors of `kernels`, float32, whole on every
    device: they are small, and about to be merged."""
    whole = sharding.replicated(mesh)
    return {
        path: jax.ShapeDtypeStruct(stored[path].shape, jnp.float32, sharding=whole)
        for kernel in sorted(kernels)
        for path in factors(kernel)
    }


def merged_dtype(kernel: DTypeLike, model: ModelConfig) -> np.dtype:
    """Returns the type of a merged kernel by that of the kernel: never narrower than what the model
    computes in, or its rounding would take from the product what the model has learned."""
    return jnp.promote_types(kernel, model.dtype)


def merged(
    params: Mapping[str, Any],
    alpha: float | None,
    model: ModelConfig,
    dtype: DTypeLike | None = None,
) -> Mapping[str, Any]:
    """Returns the model's parameters, without factors; a kernel that has some is summed in float32
    and then of `dtype`, by default `merged_dtype`. Without any factors the parameters come back as
    they are.

    Raises:
      ValueError: there are factors, and no alpha to merge them by.
    """
    if COMPONENT not in params:
        return params
    if alpha is None:
        raise ValueError("parameters have factors of LoRA, and no lora_alpha was given")
    leaves = traverse_util.flatten_dict(params, sep="/")
    for path in sorted(kernels(leaves)):
        a, b = map(leaves.pop, factors(path))
        scale = alpha / a.shape[-1]
        # Named as a part of its component, where FLOPs are counted.
        with jax.named_scope(path.split("/")[0]):
            # In full: by default a TPU would round both factors to bfloat16.
            delta = jnp.einsum(
                layouts(model)[path].product, a, b, precision=jax.lax.Precision.HIGHEST
            )
            total = leaves[path].astype(jnp.float32) + scale * delta
            leaves[path] = total.astype(dtype or merged_dtype(leaves[path].dtype, model))
    return traverse_util.unflatten_dict(leaves, sep="/")


def merge(params: Mapping[str, Any], alpha: float, model: ModelConfig) -> Mapping[str, Any]:
    """Returns what `merged` does by default, of arrays on devices: kernels without factors are not
    copied."""
    leaves = traverse_util.flatten_dict(params, sep="/")
    paths = sorted(kernels(leaves))
    if not paths:
        return params
    given = {path: x for path, x in leaves.items() if path in paths or is_factor(path)}

    def make(given: dict[str, Array]) -> dict[str, Array]:
        nested = traverse_util.unflatten_dict(given, sep="/")
        return traverse_util.flatten_dict(merged(nested, alpha, model), sep="/")

    # On the shardings of the kernels, which what was compiled for the model expects.
    shardings = {path: given[path].sharding for path in paths}
    made = jax.jit(make, out_shardings=shardings)(given)
    rest = {path: x for path, x in leaves.items() if path not in given}
    return traverse_util.unflatten_dict(rest | made, sep="/")


def reader(
    read: Callable[[str], np.ndarray], stored: Collection[str], alpha: float, model: ModelConfig
) -> Callable[[str], np.ndarray]:
    """Returns what reads a checkpoint's parameters by path as `read` does, factors merged: a
    kernel is summed in float32, and of `merged_dtype` then.

    Args:
      read: reads one parameter as it is stored.
      stored: the paths of the checkpoint's parameters.
      alpha: of the run's `config.lora`.
      model: the run's.
    """
    with_factors = kernels(stored)

    def read_merged(path: str) -> np.ndarray:
        kernel = read(path)
        if path not in with_factors:
            return kernel
        a, b = (read(factor) for factor in factors(path))
        delta = np.einsum(layouts(model)[path].product, a, b, optimize=True)
        total = kernel.astype(np.float32) + alpha / a.shape[-1] * delta
        return total.astype(merged_dtype(kernel.dtype, model))

    return read_merged
