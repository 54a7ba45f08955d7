"""The parameters that a stage starts with: loaded from a checkpoint where it has them,
initialised elsewhere."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from alignvlm_jax.config import LoraConfig, ModelConfig, TrainConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.shapes import Array
from alignvlm_jax.train import lora as lora_lib
from alignvlm_jax.train import state
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import Params, TrainState


class Found(NamedTuple):
    """What a checkpoint gives: the shapes of all its parameters, and of those asked for the
    arrays.

    `factors` are those of LoRA that are to be merged into their kernels; `alpha` is of these, and
    of those among `params` that go on.
    """

    stored: dict[str, tuple[int, ...]]
    params: Params
    factors: Params
    alpha: float = lora_lib.OFF.alpha


def read(
    train: TrainConfig,
    abstract: TrainState,
    source: Checkpoints,
    step: int,
    lora: LoraConfig = lora_lib.OFF,
) -> Found:
    """Returns what matches `train.load` and is in checkpoint `step` of `source`. Factors of LoRA
    that the stage, by its `lora`, has in the same form go on; others are for their kernels.

    Nothing is computed: where one of several processes cannot read it, all do without, and none has
    begun a program that this one will not join.

    Raises:
      UserError: a pattern of `train.load` matches nothing in the checkpoint, or shapes differ.
      BrokenCheckpoint: the checkpoint cannot be read.
    """
    wanted = _shapes(abstract.params)
    arrays = source.stored_params(step)
    stored = {path: x.shape for path, x in arrays.items()}
    loaded = loadable(train, stored, wanted, source.folder / str(step))
    theirs = source.config(step).lora
    going_on, ending = _factors(stored, wanted, loaded, same_alpha=theirs.alpha == lora.alpha)
    chosen = state.split(abstract.params, loaded | going_on)[0]
    params = source.restore_params(step, chosen) if loaded else {}
    if not ending:
        return Found(stored, params, {}, theirs.alpha)
    mesh = abstract.step.sharding.mesh
    factors = lora_lib.abstract_factors(arrays, ending, mesh)
    restored = source.restore_params(step, state.unflatten(factors))
    return Found(stored, params, restored, theirs.alpha)


def _factors(
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    loaded: set[str],
    *,
    same_alpha: bool,
) -> tuple[set[str], set[str]]:
    """Returns the paths of a checkpoint's factors of LoRA that a stage goes on with, and the
    kernels of those that end: which it does not have, or has in another shape or with another
    alpha. Merged, they are not lost. Those of kernels that are not loaded count for neither."""
    going_on = set()
    ending = set()
    for kernel in lora_lib.kernels(stored) & loaded:
        factors = lora_lib.factors(kernel)
        if same_alpha and all(wanted.get(path) == stored[path] for path in factors):
            going_on.update(factors)
        else:
            ending.add(kernel)
    return going_on, ending


def start_params(
    model: vlm.VLM, abstract: TrainState, found: Found | None, rng: jax.Array
) -> tuple[Params, Table | str]:
    """Returns the parameters, and what was loaded, initialised and ignored: a line where all are of
    one kind, else a table.

    Loaded is what was `found`, where there is a checkpoint; the rest is initialised from `rng`.
    What of the connector starts from the LLM (ALIGN's W2), and is not loaded, is made of the LLM as
    loaded.
    """
    stored, params, factors, alpha = found or Found({}, {}, {})
    wanted = _shapes(abstract.params)
    loaded = state.flatten(params).keys()
    title = "merged into their kernels"
    if factors:
        params, is_exact = _merge_factors(model, params, factors, alpha)
        title += "" if is_exact else ", rounded to bfloat16"
    initialised = wanted.keys() - loaded
    if initialised:
        params = state.merge(params, state.init_params(model, abstract.params, initialised, rng))
    # Where nothing was loaded, `init_params` has made these of the LLM that it drew.
    if loaded:
        params = remake_llm_derived(model.config, params, abstract.params, initialised, alpha)
    ending = state.flatten(factors).keys()
    used = loaded | ending
    groups = {
        "loaded": {path: wanted[path] for path in wanted if path in loaded},
        "initialised": {path: wanted[path] for path in wanted if path not in loaded},
        "ignored in the checkpoint": {path: stored[path] for path in stored if path not in used},
    }
    if ending:
        groups[title] = {path: stored[path] for path in sorted(ending)}
    return params, summary(groups)


def _merge_factors(
    model: vlm.VLM, params: Params, factors: Params, alpha: float
) -> tuple[Params, bool]:
    """Returns params whose kernels have the factors merged into them, in the types that they have,
    and whether these are all float32; factors of `params` itself stay."""
    leaves = state.flatten(params)
    merging = lora_lib.kernels(state.flatten(factors))
    kernels = state.unflatten({path: leaves[path] for path in merging})
    merged = state.flatten(lora_lib.merge(kernels | factors, alpha, model.config))
    is_exact = all(leaves[path].dtype == jnp.float32 for path in merging)
    leaves |= {path: x.astype(leaves[path].dtype) for path, x in merged.items()}
    return state.unflatten(leaves), is_exact


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {path: x.shape for path, x in state.flatten(params).items()}


def loaded_paths(train: TrainConfig, stored: Iterable[str]) -> set[str]:
    """Returns which of the paths of a checkpoint `train.load` matches; UserError where one of its
    patterns matches none. Factors of LoRA count for nothing: they go with their kernels."""
    own = [path for path in stored if not lora_lib.is_factor(path)]
    return state.match_paths(train.load, own, "train.load")


def loadable(
    train: TrainConfig,
    stored: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    name: Path,
) -> set[str]:
    """Returns the paths of `wanted` that a checkpoint of the shapes `stored` gives under
    `train.load`, but for factors of LoRA, which go with their kernels.

    Raises:
      UserError: a pattern matches nothing, or shapes differ; `name` is the checkpoint's.
    """
    chosen = loaded_paths(train, stored) & wanted.keys()
    for path in sorted(chosen):
        if stored[path] != wanted[path]:
            raise UserError(
                f"{path} is {stored[path]} in checkpoint {name} and {wanted[path]} in "
                "config.model; leave it out of config.train.load, or change the model"
            )
    return chosen


def remake_llm_derived(
    model: ModelConfig,
    params: Params,
    abstract: Params,
    paths: Collection[str],
    lora_alpha: float | None = None,
) -> Params:
    """Returns params with those at `paths` that start from the LLM made of the LLM in them, factors
    of LoRA with it, on the shardings of `abstract`; the rest is untouched."""
    made = vlm.llm_derived_paths(model, params["llm"]).intersection(paths)
    if not made:
        return params
    wanted = state.flatten(abstract)

    def make(params: Params) -> dict[str, Array]:
        new = vlm.llm_derived(model, lora_lib.merged(params, lora_alpha, model)["llm"])
        # Of the type that the stage holds it in: the LLM may be frozen, in bfloat16.
        return {path: new[path].astype(wanted[path].dtype) for path in made}

    # What it does not read is not sent: jit drops unused arguments.
    new = jax.jit(make, out_shardings={path: wanted[path].sharding for path in made})(params)
    return state.unflatten(state.flatten(params) | new)


def summary(groups: dict[str, dict[str, tuple]]) -> Table | str:
    """Returns the table of groups, or where only one of them has any parameters, a line that says
    so: a stage that loads all that the one before has left is the rule."""
    filled = [name for name, shapes in groups.items() if shapes]
    if len(filled) != 1:
        return table(groups)
    sizes = [int(np.prod(shape)) for shape in groups[filled[0]].values()]
    return f"parameters: all {len(sizes)} arrays, {sum(sizes):,} numbers, are {filled[0]}"


def table(groups: dict[str, dict[str, tuple]]) -> Table:
    """Returns a table of groups of shapes by path, a row for each top-level part; cells are "arrays
    / numbers"."""
    result = Table("part", *groups, title="parameters: arrays / numbers", title_justify="left")
    for part in dict.fromkeys(path.split("/")[0] for group in groups.values() for path in group):
        shapes = (
            [shape for path, shape in group.items() if path.split("/")[0] == part]
            for group in groups.values()
        )
        result.add_row(part, *map(_count, shapes))
    return result


def _count(shapes: list[tuple]) -> str:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return f"{len(sizes)} / {sum(sizes):,}" if sizes else "-"
