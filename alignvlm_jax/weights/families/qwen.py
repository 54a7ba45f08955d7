"""Qwen: the dense models of Qwen 2 and 2.5, with biases at queries, keys and values, and of Qwen 3,
with queries and keys normalised by head."""

from types import MappingProxyType
from typing import Any

from alignvlm_jax.config import LLMConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.families.base import Fields
from alignvlm_jax.weights.families.llama import BLOCKS, LAYER, Llama, refuse_window
from alignvlm_jax.weights.mapping import Entry

FULL = "full_attention"
SLIDING = "sliding_attention"
CLASS_WINDOW = 4096
"""Tokens of the classes' own default of sliding_window."""


class Qwen(Llama):
    """What the dense models of all versions share."""

    gguf_pairs_neighbours = False

    def read(self, fields: Fields) -> LLMConfig:
        """See LLMFamily."""
        refuse_windows(fields)
        return super().read(fields)

    def hf_config(self, config: LLMConfig) -> dict[str, Any]:
        """See LLMFamily."""
        return {**super().hf_config(config), "use_sliding_window": False}


class Qwen2(Qwen):
    """Qwen 2 and 2.5."""

    model_type = "qwen2"
    class_name = "Qwen2ForCausalLM"
    traits = MappingProxyType({"qkv_bias": True})
    gguf_architecture = "qwen2"
    absent = ()
    stated = ("num_key_value_heads",)

    def entries(self, config: LLMConfig) -> tuple[Entry, ...]:
        """See LLMFamily."""
        attention = f"{LAYER}.self_attn"
        biases = (
            Entry(f"{BLOCKS}/attn/q/bias", f"{attention}.q_proj.bias", "Hh -> (Hh)"),
            Entry(f"{BLOCKS}/attn/k/bias", f"{attention}.k_proj.bias", "Kh -> (Kh)"),
            Entry(f"{BLOCKS}/attn/v/bias", f"{attention}.v_proj.bias", "Kh -> (Kh)"),
        )
        return (*super().entries(config), *biases)


class Qwen3(Qwen):
    """The dense models of Qwen 3."""

    model_type = "qwen3"
    class_name = "Qwen3ForCausalLM"
    traits = MappingProxyType({"qk_norm": True})
    gguf_architecture = "qwen3"
    absent = ("attention_bias",)
    stated = ("num_key_value_heads", "head_dim")

    def entries(self, config: LLMConfig) -> tuple[Entry, ...]:
        """See LLMFamily."""
        attention = f"{LAYER}.self_attn"
        norms = (
            Entry(f"{BLOCKS}/attn/q_norm/scale", f"{attention}.q_norm.weight", "h -> h"),
            Entry(f"{BLOCKS}/attn/k_norm/scale", f"{attention}.k_norm.weight", "h -> h"),
        )
        return (*super().entries(config), *norms)


def refuse_windows(fields: Fields) -> None:
    """Raises UserError where some layer sees a window of the tokens alone; the size of a window
    stands in every config.json, whether a layer uses it or not."""
    known = {FULL}
    if fields.flag("use_sliding_window", False):
        refuse_window(fields, CLASS_WINDOW)
        # A window that holds whole sequences is none.
        known.add(SLIDING)
    others = sorted(set(fields.texts("layer_types")) - known)
    if others:
        raise UserError(f"{fields.path}: layer_types names {others[0]!r}; read are: {FULL!r}")
