"""The optimizer of a stage: clipping, AdamW on a schedule, weight decay on matrices only."""

from collections.abc import Mapping

import optax

from alignvlm_jax.config import OptimConfig
from alignvlm_jax.shapes import Array, Int
from alignvlm_jax.train import state

DECAYED = ("kernel", "table")
"""Last names of the parameters that decay.

Shapes cannot tell: under scan a norm's scale has two dimensions too.
"""


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
    return optax.chain(
        # By the norm of all gradients of the stage together, before Adam sees them.
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            make_schedule(optim, num_steps),
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=decay_mask,
        ),
        # Last: Adam divides by the size of the gradients, and would undo a factor that they had
        # before it.
        *([_scale_components(scales)] if scales else []),
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
    """AdamW keeps two equal counts, Adam's and the schedule's; `tree_get` wants one."""
    del value
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
