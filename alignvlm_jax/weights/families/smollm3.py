"""SmolLM3: a Llama of which every fourth layer has no rotary positions (NoPE, arXiv 2501.18795)."""

import dataclasses
from types import MappingProxyType
from typing import Any

from alignvlm_jax.config import LLMConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.families.base import Fields
from alignvlm_jax.weights.families.llama import Llama
from alignvlm_jax.weights.families.qwen import refuse_windows

INTERVAL = 4


class SmolLM3(Llama):
    """SmolLM3-3B and its base."""

    model_type = "smollm3"
    class_name = "SmolLM3ForCausalLM"
    traits = MappingProxyType({"no_rope_every": INTERVAL})
    gguf_architecture = "smollm3"
    stated = ("num_key_value_heads",)
    default_theta = 2000000.0
    default_tie = True

    def read(self, fields: Fields) -> LLMConfig:
        """See LLMFamily."""
        refuse_windows(fields)
        config = super().read(fields)
        interval = _no_rope_every(fields, config.num_layers)
        return dataclasses.replace(config, no_rope_every=interval)

    def hf_config(self, config: LLMConfig) -> dict[str, Any]:
        """See LLMFamily."""
        return {
            **super().hf_config(config),
            "use_sliding_window": False,
            "no_rope_layer_interval": config.no_rope_every,
            "no_rope_layers": _rotates(config.no_rope_every, config.num_layers),
            # Its class has the end of Llama 3's table, which a smaller one has not.
            "pad_token_id": None,
        }


def _rotates(interval: int, num_layers: int) -> list[int]:
    """For each layer whether it has rotary positions, as `no_rope_layers` says it, against its
    name."""
    return [int(interval == 0 or (layer + 1) % interval != 0) for layer in range(num_layers)]


def _no_rope_every(fields: Fields, num_layers: int) -> int:
    """The interval of the layers without rotary positions; 0 where all have them.

    Raises:
      UserError: the layers that are listed have no interval.
    """
    interval = fields.integer("no_rope_layer_interval", INTERVAL)
    listed = fields.get("no_rope_layers", _rotates(interval, num_layers))
    if not isinstance(listed, list):
        raise UserError(
            f"{fields.path}: no_rope_layers is {listed!r}; it must be a list of 0 and 1"
        )
    listed = listed[:num_layers]
    if listed == _rotates(interval, num_layers):
        return interval
    # A list goes before the interval that may stand beside it.
    interval = listed.index(0) + 1 if 0 in listed else 0
    if listed != _rotates(interval, num_layers):
        without = [layer for layer, rotates in enumerate(listed) if not rotates]
        raise UserError(
            f"{fields.path}: no_rope_layers names {len(listed)} of {num_layers} layers, and has no "
            f"rotary positions in {without}; read is one layer in every so many"
        )
    return interval
