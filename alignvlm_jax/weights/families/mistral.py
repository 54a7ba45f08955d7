"""Mistral: a Llama, but for its first version, which sees a window of the tokens alone and is
refused."""

from typing import Any

from alignvlm_jax.config import LLMConfig
from alignvlm_jax.weights.families.base import Fields
from alignvlm_jax.weights.families.llama import Llama, refuse_window


class Mistral(Llama):
    """Mistral 7B from version 0.2 on, Nemo, Small. In a GGUF, and in what is exported, it is the
    Llama that it is."""

    model_type = "mistral"
    class_name = "MistralForCausalLM"
    absent = ()
    stated = ("num_key_value_heads",)

    def read(self, fields: Fields) -> LLMConfig:
        """See LLMFamily."""
        refuse_window(fields, default=4096)
        return super().read(fields)

    def hf_config(self, config: LLMConfig) -> dict[str, Any]:
        """See LLMFamily."""
        return {**super().hf_config(config), "sliding_window": None}
