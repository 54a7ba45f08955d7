"""Llama: LlamaForCausalLM of Hugging Face, and what other families of its shape share with it."""

import math
from typing import Any, ClassVar

from alignvlm_jax.config import LLMConfig, RopeScaling
from alignvlm_jax.errors import UserError
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
    # Fields that must be there, since the class's own defaults are other values than those that
    # follow from a Llama's sizes.
    stated: ClassVar[tuple[str, ...]] = ()
    # The class's defaults of rope_theta and tie_word_embeddings.
    default_theta: ClassVar[float] = 10000.0
    default_tie: ClassVar[bool] = False

    def read(self, fields: Fields) -> LLMConfig:
        """See LLMFamily."""
        fields.choose("hidden_act", ("silu", "swish"), "silu")
        for name in self.absent:
            fields.choose(name, (False,), False)
        for name in self.stated:
            # For what it raises where the field is missing.
            fields[name]
        theta, scaling = read_rope(fields, self.default_theta)
        width = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads", at_least=1)
        return LLMConfig(
            vocab_size=fields.integer("vocab_size"),
            width=width,
            mlp_width=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=num_heads,
            # Without the field each query head has keys and values of its own.
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=fields.integer("head_dim", width // num_heads),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=fields.flag("tie_word_embeddings", self.default_tie),
            context_length=fields.integer("max_position_embeddings", 0),
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
            "rope_scaling": write_rope(config.rope_scaling),
            "tie_word_embeddings": config.tie_embeddings,
            **dict.fromkeys(self.absent, False),
            # We have no such limit: positions are computed. Without a context length that is known,
            # `export` puts that of the training in its place.
            "max_position_embeddings": config.context_length,
        }


def refuse_window(fields: Fields, default: int | None) -> None:
    """Raises UserError where layers see a window of the tokens alone that is shorter than the
    sequences of the model.

    Args:
      default: the class's own window, in tokens, which one that is absent has; null is none.
    """
    window = fields.get("sliding_window", None if "sliding_window" in fields else default)
    if window is None:
        return
    window = fields.integer("sliding_window", window)
    length = fields.integer("max_position_embeddings")
    if window < length:
        raise UserError(
            f"{fields.path}: layers see a sliding_window of {window} tokens of the {length} of "
            "max_position_embeddings, and ours see all; for sequences of up to "
            f"{window} tokens set max_position_embeddings to {window}"
        )


def read_rope(fields: Fields, default_theta: float) -> tuple[float, RopeScaling]:
    """Returns the base and the scaling of the rotary positions, as transformers 5 writes them
    (rope_parameters) or 4 (rope_theta and rope_scaling).

    Raises:
      UserError: a scaling that is not computed here.
    """
    # In this order, as transformers takes them; an empty group is none.
    where = next((name for name in ("rope_scaling", "rope_parameters") if fields.get(name)), "")
    rope = fields.within(where) if where else fields
    # Transformers 5 writes a group for each kind of layer where a family has several.
    if rope is None or (where and any(isinstance(x, dict) for x in fields[where].values())):
        raise UserError(
            f"{fields.path}: {where} is {fields[where]!r}; it must be one group for all layers"
        )
    theta = rope.number("rope_theta", fields.number("rope_theta", default_theta))
    for group in (fields, rope):
        group.choose("partial_rotary_factor", (1, 1.0), 1.0)
    kind = "rope_type" if "rope_type" in rope else "type"
    name = rope.get(kind, "default") if where else "default"
    if name == "default":
        return theta, RopeScaling()
    if not isinstance(name, str) or name not in SCALINGS:
        raise UserError(
            f"{fields.path}: {kind} of {where} is {name!r}; read are: 'default', "
            f"{', '.join(map(repr, SCALINGS))}{VARYING if name in ('dynamic', 'longrope') else ''}"
        )
    return theta, SCALINGS[name](fields, rope)


VARYING = (
    ". Such frequencies change with a sequence's length: for sequences within the model's first "
    "length, without them, take the group out of the file"
)


def _llama3(fields: Fields, rope: Fields) -> RopeScaling:
    return RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_length=_original_length(fields, rope),
    )


def _linear(fields: Fields, rope: Fields) -> RopeScaling:
    return RopeScaling(type="linear", factor=rope.number("factor"))


def _yarn(fields: Fields, rope: Fields) -> RopeScaling:
    rope.choose("truncate", (True,), True)
    factor = rope.number("factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    # DeepSeek's, of which the second is the softmax's own scale and taken out again.
    mscale = rope.number("mscale", 0.0)
    mscale_all = rope.number("mscale_all_dim", 0.0)
    is_given = mscale and mscale_all
    attention_factor = scale(mscale) / scale(mscale_all) if is_given else scale(1.0)
    return RopeScaling(
        type="yarn",
        factor=factor,
        low_freq_factor=rope.number("beta_slow", 1.0) or 1.0,
        high_freq_factor=rope.number("beta_fast", 32.0) or 32.0,
        attention_factor=rope.number("attention_factor", attention_factor),
        original_length=_original_length(fields, rope),
    )


SCALINGS = {"llama3": _llama3, "linear": _linear, "yarn": _yarn}
"""What reads a `rope_type` of a config.json."""


def _original_length(fields: Fields, rope: Fields) -> int:
    name = "original_max_position_embeddings"
    if name in fields or name not in rope:
        return fields.integer(name, fields.integer("max_position_embeddings"))
    return rope.integer(name)


def write_rope(scaling: RopeScaling) -> dict[str, Any] | None:
    """Returns the `rope_scaling` of a config.json; None without any."""
    # YaRN's factor of the attention counts beside a factor of 1, too.
    if scaling.factor == 1.0 and (scaling.type != "yarn" or scaling.attention_factor == 1.0):
        return None
    written = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "linear":
        return written
    written["original_max_position_embeddings"] = scaling.original_length
    if scaling.type == "llama3":
        return written | {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    return written | {
        "beta_slow": scaling.low_freq_factor,
        "beta_fast": scaling.high_freq_factor,
        "attention_factor": scaling.attention_factor,
    }
