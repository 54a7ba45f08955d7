"""A tower from a folder, imported and applied as the model applies it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from alignvlm_jax.models.decoder import Llama
from alignvlm_jax.models.vit import Siglip
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import state
from alignvlm_jax.weights import load
from alignvlm_jax.weights.source import Tower

FLOAT32 = jnp.dtype("float32")


def run_llm(tower: Tower, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [B, T, V] of tokens [B, T]."""
    tokens = tokens.astype(np.int32)
    return _apply(_llm(tower), read_llm(tower), tokens, method=_logits)


def read_llm(tower: Tower) -> dict[str, Any]:
    """Parameters of a Llama, float32."""
    return _read(tower, _llm(tower), "llm", np.zeros((1, 1), np.int32), method=_logits)


def run_vision(tower: Tower, pixels: np.ndarray) -> np.ndarray:
    """Last hidden states float32 [B, P, E] of uint8 pixels [B, Y, X, 3]."""
    module = Siglip(tower.config, FLOAT32, "none")
    return _apply(module, _read(tower, module, "vision", pixels), pixels)


def normalised(tower: Tower, pixels: np.ndarray) -> np.ndarray:
    """Pixels as a reference takes them: float32 [B, 3, Y, X]."""
    config = tower.config
    scaled = (pixels.astype(np.float32) / 255 - np.float32(config.pixel_mean)) / np.float32(
        config.pixel_std
    )
    return scaled.transpose(0, 3, 1, 2)


def _llm(tower: Tower) -> Llama:
    return Llama(tower.config, FLOAT32, "none")


def _logits(llm: Llama, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = llm(llm.embed(tokens), positions)
    return llm.logits(hidden)


def _read(
    tower: Tower, module: nn.Module, part: str, inputs: np.ndarray, **kwargs
) -> dict[str, Any]:
    boxed = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), inputs)[
        "params"
    ]
    shapes = state.flatten({part: sharding.unbox(boxed)})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for path, x in shapes.items()
    }
    load.check_tower(tower, wanted)
    return state.unflatten(
        {path: x.astype(jnp.float32) for path, x in load.load_tower(tower, wanted).items()}
    )[part]


def _apply(module: nn.Module, params: dict[str, Any], inputs: np.ndarray, **kwargs) -> np.ndarray:
    return np.asarray(
        jax.jit(functools.partial(module.apply, **kwargs))({"params": params}, inputs)
    )


def without_scaling(tower: Tower) -> Tower:
    """The same weights with plain rotary positions, to see that scaling matters."""
    scaling = dataclasses.replace(tower.config.rope_scaling, factor=1.0)
    return dataclasses.replace(
        tower, config=dataclasses.replace(tower.config, rope_scaling=scaling)
    )
