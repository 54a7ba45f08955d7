"""A run with LoRA, as training would leave it: what tests of exports and adapters share."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax.config import LoraConfig
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, lora, restore, state
from alignvlm_jax.train.checkpoint import Checkpoints

TARGETS = ("llm/.*/(attn|mlp)/.*/kernel", "connector/w1/kernel")


def write(
    workdir: pathlib.Path,
    base: pathlib.Path,
    rank: int = 3,
    alpha: float = 6.0,
    targets: tuple[str, ...] = TARGETS,
    bfloat16_params: tuple[str, ...] = (),
) -> None:
    """Writes the checkpoint of step 5 of a run that gave factors to `targets`, by default every
    kernel of the decoder's layers and one of the connector, beside the parameters of the checkpoint
    `base`."""
    config, _, params, _ = restore.load_model(base, mesh_lib.single_device())
    train = dataclasses.replace(config.train, bfloat16_params=bfloat16_params)
    settings = LoraConfig(rank=rank, alpha=alpha, targets=targets)
    config = dataclasses.replace(config, lora=settings, train=train)
    leaves = state.flatten(params)
    for path in state.match_paths(bfloat16_params, leaves, "train.bfloat16_params"):
        leaves[path] = leaves[path].astype(jnp.bfloat16)
    kernels = state.match_paths(targets, leaves, "lora.targets")
    params = lora.add(state.unflatten(leaves), kernels, rank, config.model)
    rng = np.random.default_rng(0)
    drawn = {
        path: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
        if lora.is_factor(path)
        else x
        for path, x in state.flatten(params).items()
    }
    metadata = checkpoint.describe((config,), config, train_seconds=1.0, answer_loss=None)
    with Checkpoints(workdir / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(
            5,
            state.TrainState(np.int32(5), jax.device_put(state.unflatten(drawn)), ()),
            position={"next_sequence": 0},
            metadata=metadata,
            metrics=None,
        )
