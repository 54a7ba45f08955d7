"""States of a tiny model with LoRA, which the tests of it share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import LoraConfig
from alignvlm_jax.models import vlm
from alignvlm_jax.train import optim, state
from tests.conftest import tiny_config

Q = "llm/blocks/attn/q/kernel"
LORA = LoraConfig(rank=3, alpha=6.0)
ALL = dataclasses.replace(
    LORA, targets=("llm/.*/(attn|mlp)/.*/kernel", "connector/w1/kernel", "vision/patch_embed/kernel")
)  # fmt: skip


def with_lora(rank: LoraConfig = LORA, **changes) -> config_lib.Config:
    config = tiny_config()
    changes = {"trainable": ("connector/.*",), **changes}
    train = dataclasses.replace(config.train, **changes)
    return dataclasses.replace(config, lora=rank, train=train)


def abstract_of(config: config_lib.Config, mesh) -> state.TrainState:
    tx = optim.make_optimizer(config.optim, config.train.num_steps)
    return state.abstract_state(vlm.VLM(config.model), config.train, tx, mesh, config.lora)


def drawn(abstract: state.Params, seed: int = 0) -> state.Params:
    """Parameters as after some training: no factor is zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract
    )
