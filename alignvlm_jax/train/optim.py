"""The optimizer of a stage: clipping, AdamW, Adafactor or Muon on a schedule, weight decay on
matrices only."""

import math
import operator
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from alignvlm_jax.config import OptimConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.shapes import Array, Int
from alignvlm_jax.train import state

DECAYED = ("kernel", "table", "a", "b")
"""Last names of the parameters that decay; a and b are the factors of LoRA.

Shapes cannot tell: under scan a norm's scale has two dimensions too.
"""

MIN_FACTORED = 128
"""Size of the second largest axis from which Adafactor factors a matrix; optax's default."""

HIDDEN = {
    r".*/attn/[qkv]/kernel": MuonDimensionNumbers(-3, (-2, -1)),
    r".*/attn/o/kernel": MuonDimensionNumbers((-3, -2), -1),
    r".*/mlp/(gate|up|down)/kernel": MuonDimensionNumbers(-2, -1),
    r"connector/(w1|fc\d?|proj|\w+/conv[13]|\w+/gate/(down|up))/kernel": MuonDimensionNumbers(
        -2, -1
    ),
}
"""Axes that are summed over, and those of the result, of the kernels that Muon updates, by their
paths; an axis of layers comes before them. Not there: kernels onto a vocabulary (heads, ALIGN's
w2), those that pixels meet first, convolutions, and the factors of LoRA.
"""
MUON_RMS = 0.2  # Root mean square of Muon's updates, about that of AdamW's (arXiv 2502.16982).


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
    make = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}[optim.name]
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


def _muon(optim: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (by Keller Jordan, 2024) for the matrices of `HIDDEN`, each layer's by itself, AdamW for
    the rest. Not by `optax.contrib.muon`: it has two schedules, and its state does not lie under
    the parameters' paths alone.

    Raises:
      UserError: on `init`, of parameters none of which Muon updates.
    """

    def axes(tree: state.Params) -> state.Params:
        return state.unflatten(
            {path: _hidden_axes(path) or optax.MaskedNode() for path in state.flatten(tree)}
        )

    def is_hidden(params: state.Params) -> state.Params:
        found = {path: _hidden_axes(path) is not None for path in state.flatten(params)}
        if not any(found.values()):
            raise UserError(
                "config.optim.name is 'muon', which is for hidden matrices of the towers and the "
                "connector, and config.train.trainable matches none of them; use 'adamw'"
            )
        return state.unflatten(found)

    def as_large_as_adamws(updates: state.Params, params: state.Params | None) -> state.Params:
        del params

        # All singular values are about 1: the squares of the entries sum to the shorter side.
        def scale(x: Array, axes: MuonDimensionNumbers) -> Array:
            sides = [math.prod(x.shape[i] for i in np.atleast_1d(one)) for one in axes]
            return MUON_RMS * math.sqrt(max(sides)) * x

        return jax.tree.map(scale, updates, axes(updates))

    return optax.chain(
        optax.masked(
            optax.chain(
                scale_by_muon(weight_dimension_numbers=axes), optax.stateless(as_large_as_adamws)
            ),
            is_hidden,
        ),
        optax.masked(
            optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
            lambda params: jax.tree.map(operator.not_, is_hidden(params)),
        ),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _hidden_axes(path: str) -> MuonDimensionNumbers | None:
    return next((axes for pattern, axes in HIDDEN.items() if re.fullmatch(pattern, path)), None)


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
