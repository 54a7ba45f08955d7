"""The optimizer of a stage: clipping, AdamW or Adafactor on a schedule, weight decay on matrices
only."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from alignvlm_jax.config import OptimConfig
from alignvlm_jax.shapes import Array, Int
from alignvlm_jax.train import state

DECAYED = ("kernel", "table", "a", "b")
"""Last names of the parameters that decay; a and b are the factors of LoRA.

Shapes cannot tell: under scan a norm's scale has two dimensions too.
"""

MIN_FACTORED = 128
"""Size of the second largest axis from which Adafactor factors a matrix; optax's default."""


def make_schedule(optim: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by the number of updates made in a stage of so many steps: linear
    warm-up, then a cosine."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optim.learning_rate,
        # optax refuses a warm-up that leaves no step for the cosine.
        warmup_steps=min(optim.warmup_steps, num_steps - 1),
        decay_steps=num_steps,
        end_value=optim.learning_rate * optim.final_fraction,
    )


def make_optimizer(optim: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the optax chain of a stage of so many steps."""
    scales = optim.learning_rate_scale
    make = {"adamw": _adamw, "adafactor": _adafactor}[optim.name]
    return optax.chain(
        # By the norm of all gradients of the stage together, before the optimizer sees them.
        optax.clip_by_global_norm(optim.clip_norm),
        make(optim, make_schedule(optim, num_steps)),
        # Last: Adam divides by the size of the gradients, and would undo a factor that they had
        # before it.
        *([_scale_components(scales)] if scales else []),
    )


def _adamw(optim: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    adamw = optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )
    return adamw if optim.moment_dtype == "float32" else _stored_as(adamw, optim.moment_dtype)


def _stored_as(
    inner: optax.GradientTransformation, dtype: DTypeLike
) -> optax.GradientTransformation:
    """Keeps the state of an optimizer as `dtype` between steps, and computes in float32; optax has
    such an option for the first moment alone."""

    def cast(tree: optax.OptState, to: DTypeLike) -> optax.OptState:
        # Counts stay whole numbers.
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def init(params: state.Params) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(
        grads: state.Params, stored: optax.OptState, params: state.Params | None = None
    ) -> tuple[state.Params, optax.OptState]:
        updates, new = inner.update(grads, cast(stored, jnp.float32), params)
        return updates, cast(new, dtype)

    return optax.GradientTransformation(init, update)


def _adafactor(optim: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) without a first moment. Unlike in `optax.adafactor`, updates are
    not scaled by the size of their parameter, and decay is by the learning rate: both then are of
    the size that they have with AdamW."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=MIN_FACTORED),
        # An update whose root mean square is above 1 is scaled down to it, as in the paper.
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_components(scales: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of whole components of the model, which is to multiply their learning
    rate."""

    def scaled(updates: state.Params, params: state.Params | None) -> state.Params:
        del params
        return {
            component: optax.tree_utils.tree_scale(scales.get(component, 1.0), tree)
            for component, tree in updates.items()
        }

    return optax.stateless(scaled)


def decay_mask(params: state.Params) -> state.Params:
    """Returns True at matrices, False at norms, biases and position embeddings."""
    return state.unflatten({path: path.split("/")[-1] in DECAYED for path in state.flatten(params)})


def num_updates(opt_state: optax.OptState) -> Int[Array, ""]:
    """Returns how many updates the optimizer has made in this stage; skipped steps do not count."""
    return optax.tree_utils.tree_get(opt_state, "count", filtering=_is_schedule)


def _is_schedule(path: tuple, value: Array) -> bool:
    """Optimizers keep two equal counts, their own and the schedule's; `tree_get` wants one."""
    del value
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
