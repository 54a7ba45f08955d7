"""Llama: LlamaForCausalLM of Hugging Face, and what other families of its shape share with it."""

from typing import Any, ClassVar

from alignvlm_jax.config import LLMConfig, RopeScaling
from alignvlm_jax.weights.families.base import Fields, LLMFamily
from alignvlm_jax.weights.mapping import Entry

BLOCKS = "llm/blocks"
LAYER = "model.layers.{}"


class Llama(LLMFamily):
    """Llama 2, 3, SmolLM2, TinyLlama, ..."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"
    gguf_architecture = "llama"
    gguf_pairs_neighbours = True
    # Biases that the class can have, and that no published weights of it do.
    absent: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")

    def read(self, fields: Fields) -> LLMConfig:
        """See LLMFamily."""
        fields.choose("hidden_act", ("silu",), "silu")
        for name in self.absent:
            fields.choose(name, (False,), False)
        theta, scaling = read_rope(fields)
        width = fields["hidden_size"]
        num_heads = fields["num_attention_heads"]
        return LLMConfig(
            vocab_size=fields["vocab_size"],
            width=width,
            mlp_width=fields["intermediate_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=num_heads,
            # Without the field each query head has keys and values of its own.
            num_kv_heads=fields.get("num_key_value_heads") or num_heads,
            head_dim=fields.get("head_dim") or width // num_heads,
            norm_eps=fields.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=fields.get("tie_word_embeddings", False),
            **self.traits,
        )

    def entries(self, config: LLMConfig) -> tuple[Entry, ...]:
        """See LLMFamily."""
        attention = f"{LAYER}.self_attn"
        mlp = f"{LAYER}.mlp"
        head = (Entry("llm/head/kernel", "lm_head.weight", "DV -> VD"),)
        return (
            Entry("llm/embed/table", "model.embed_tokens.weight", "VD -> VD"),
            Entry(f"{BLOCKS}/attn_norm/scale", f"{LAYER}.input_layernorm.weight", "D -> D"),
            Entry(f"{BLOCKS}/attn/q/kernel", f"{attention}.q_proj.weight", "DHh -> (Hh)D"),
            Entry(f"{BLOCKS}/attn/k/kernel", f"{attention}.k_proj.weight", "DKh -> (Kh)D"),
            Entry(f"{BLOCKS}/attn/v/kernel", f"{attention}.v_proj.weight", "DKh -> (Kh)D"),
            Entry(f"{BLOCKS}/attn/o/kernel", f"{attention}.o_proj.weight", "HhD -> D(Hh)"),
            Entry(f"{BLOCKS}/mlp_norm/scale", f"{LAYER}.post_attention_layernorm.weight", "D -> D"),
            Entry(f"{BLOCKS}/mlp/gate/kernel", f"{mlp}.gate_proj.weight", "DF -> FD"),
            Entry(f"{BLOCKS}/mlp/up/kernel", f"{mlp}.up_proj.weight", "DF -> FD"),
            Entry(f"{BLOCKS}/mlp/down/kernel", f"{mlp}.down_proj.weight", "FD -> DF"),
            Entry("llm/final_norm/scale", "model.norm.weight", "D -> D"),
            *(() if config.tie_embeddings else head),
        )

    def ignored(self, config: LLMConfig) -> tuple[str, ...]:
        """See LLMFamily."""
        # A tied head is written out by some: it is the table once more.
        head = ("lm_head.weight",) if config.tie_embeddings else ()
        return (r".*\.rotary_emb\.inv_freq", *head)

    def hf_config(self, config: LLMConfig) -> dict[str, Any]:
        """See LLMFamily."""
        scaling = config.rope_scaling
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": write_rope(scaling),
            "tie_word_embeddings": config.tie_embeddings,
            **dict.fromkeys(self.absent, False),
            # We have no such limit: positions are computed. It only has to be no less than what is
            # asked for.
            "max_position_embeddings": int(scaling.original_length * scaling.factor),
        }


def read_rope(fields: Fields) -> tuple[float, RopeScaling]:
    """Returns the base and the scaling of the rotary positions, as transformers 5 writes them
    (rope_parameters) or 4 (rope_theta and rope_scaling).

    Raises:
      UserError: they are scaled otherwise than Llama 3's.
    """
    # Without either group the whole config.json stands in, which has a base and no scaling.
    rope = fields.within("rope_parameters") or fields.within("rope_scaling") or fields
    theta = float(rope.get("rope_theta") or fields.get("rope_theta", 10000.0))
    kind = "rope_type" if rope.get("rope_type") else "type"
    if rope is fields or rope.choose(kind, ("default", "llama3"), "default") == "default":
        return theta, RopeScaling()
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_length=int(rope["original_max_position_embeddings"]),
    )


def write_rope(scaling: RopeScaling) -> dict[str, Any] | None:
    """Returns the `rope_scaling` of a config.json; None without any."""
    if scaling.factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
