"""Small random models as Hugging Face publishes them, from numpy seeds: no torch is needed to write
them.

Numbers are drawn in the order of sorted names, so that the goldens made from a folder belong to its
seed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,  # Not width / heads.
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Awkward sizes; LLAMAS are variants of it by name."""
LLAMAS: dict[str, dict[str, Any]] = {
    "untied": {"rope_theta": 500.0},
    "tied": {"rope_theta": 500.0, "tie_word_embeddings": True, "rope_scaling": None},
    "scaled, transformers 4": {"rope_theta": 500.0, "rope_scaling": LLAMA3_SCALING},
    "scaled, transformers 5": {
        "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 300.0},
        "tie_word_embeddings": True,
    },
}
QWENS: dict[str, dict[str, Any]] = {
    # A window's size stands in every config.json of Qwen's, used or not.
    "qwen2, untied": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 500.0,
        "use_sliding_window": False,
        "sliding_window": 8,
        "max_window_layers": 3,
    },
    "qwen2, tied": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "layer_types": ["full_attention"] * 7,
        "tie_word_embeddings": True,
    },
    "qwen3, untied": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 500.0,
        "head_dim": 10,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "qwen3, tied": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 300.0},
        "tie_word_embeddings": True,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "rope_theta": 500.0,
        "sliding_window": None,
    },
    "mistral, tied": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "sliding_window": 64,  # No shorter than a sequence.
        "tie_word_embeddings": True,
    },
    "smollm3": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "rope_theta": 500.0,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1, 1, 1],
        "layer_types": ["full_attention"] * 7,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "smollm3, untied, scaled": {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "rope_parameters": {**YARN, "rope_theta": 300.0},
        "no_rope_layer_interval": 3,
        "pad_token_id": 0,
    },
    "yarn": {"rope_theta": 500.0, "rope_scaling": YARN},
    "linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
}
"""Of other families, and Llamas of other rotary scalings."""
DECODERS = LLAMAS | QWENS | OTHERS
VISION = {
    "image_size": 24,
    "patch_size": 6,
    "num_channels": 3,
    "hidden_size": 18,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "layer_norm_eps": 1e-3,
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
SIGLIP2 = {**SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 16}
DINOV2 = {
    **{name: value for name, value in VISION.items() if name != "intermediate_size"},
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "mlp_ratio": 2,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}


def write_llama(
    folder: Path,
    variant: str,
    seed: int = 0,
    dtype: Any = np.float32,
    num_shards: int = 1,
    **changes: Any,
) -> Path:
    """Writes a model of DECODERS, in shards with an index where there are several."""
    fields = LLAMA | DECODERS[variant] | changes
    width = fields["hidden_size"]
    mlp = fields["intermediate_size"]
    heads = fields["num_attention_heads"]
    kv = fields["num_key_value_heads"] * fields["head_dim"]
    head = heads * fields["head_dim"]
    shapes = {
        "model.embed_tokens.weight": (fields["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (head, width),
            f"{prefix}.self_attn.k_proj.weight": (kv, width),
            f"{prefix}.self_attn.v_proj.weight": (kv, width),
            f"{prefix}.self_attn.o_proj.weight": (width, head),
            f"{prefix}.mlp.gate_proj.weight": (mlp, width),
            f"{prefix}.mlp.up_proj.weight": (mlp, width),
            f"{prefix}.mlp.down_proj.weight": (width, mlp),
        }
        if fields["model_type"] == "qwen2":
            sizes = {"q": head, "k": kv, "v": kv}
            shapes |= {f"{prefix}.self_attn.{n}_proj.bias": (size,) for n, size in sizes.items()}
        if fields["model_type"] == "qwen3":
            norms = dict.fromkeys("qk", (fields["head_dim"],))
            shapes |= {f"{prefix}.self_attn.{n}_norm.weight": size for n, size in norms.items()}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (fields["vocab_size"], width)
    return _write(folder, fields, shapes, seed, dtype, num_shards)


def random_sizes(seed: int) -> dict[str, int]:
    """Awkward sizes of a decoder: odd widths, one or many key-value heads, head_dim of its own."""
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 4))
    num_heads = kv_heads * int(rng.integers(1, 5))
    return {
        "vocab_size": int(rng.integers(50, 150)),
        # Transformers refuses others than multiples, though head_dim is given.
        "hidden_size": num_heads * (1 + int(rng.integers(9, 40)) // num_heads),
        "intermediate_size": int(rng.integers(10, 60)),
        "num_hidden_layers": int(rng.integers(1, 9)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * int(rng.integers(3, 9)),
    }


def write_siglip(
    folder: Path,
    seed: int = 0,
    *,
    is_whole: bool = False,
    is_naflex: bool = False,
    sizes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a SiglipVisionModel with its pooling head; `is_whole`: a SiglipModel with a text tower
    around it; `is_naflex`: SigLIP 2 with its flat patch embedding."""
    fields = (SIGLIP2 if is_naflex else SIGLIP) | (sizes or {})
    width = fields["hidden_size"]
    mlp = fields["intermediate_size"]
    patch = fields["patch_size"]
    embedding = (width, patch * patch * 3) if is_naflex else (width, 3, patch, patch)
    prefix = "vision_model"
    shapes = {
        f"{prefix}.embeddings.patch_embedding.weight": embedding,
        f"{prefix}.embeddings.patch_embedding.bias": (width,),
        f"{prefix}.embeddings.position_embedding.weight": (
            fields.get("num_patches", (fields["image_size"] // patch) ** 2),
            width,
        ),
        **_linear(f"{prefix}.post_layernorm", (width,)),
        f"{prefix}.head.probe": (1, 1, width),
        f"{prefix}.head.attention.in_proj_weight": (3 * width, width),
        f"{prefix}.head.attention.in_proj_bias": (3 * width,),
        **_linear(f"{prefix}.head.attention.out_proj", (width, width)),
        **_linear(f"{prefix}.head.layernorm", (width,)),
        **_linear(f"{prefix}.head.mlp.fc1", (mlp, width)),
        **_linear(f"{prefix}.head.mlp.fc2", (width, mlp)),
    }
    for layer in range(fields["num_hidden_layers"]):
        shapes |= _block(
            f"{prefix}.encoder.layers.{layer}",
            ("layer_norm1", "layer_norm2"),
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
            width,
            mlp,
        )
    if is_whole:
        fields = {
            "model_type": "siglip",
            "vision_config": {**fields, "model_type": "siglip_vision_model"},
        }
        shapes |= {
            "text_model.embeddings.token_embedding.weight": (8, 4),
            "logit_scale": (1,),
            "logit_bias": (1,),
        }
    return _write(folder, fields, shapes, seed)


def write_dinov2(folder: Path, seed: int = 0) -> Path:
    """Writes a Dinov2Model: layer scale, class and mask token, positions with an entry for the
    class token."""
    width = DINOV2["hidden_size"]
    patch = DINOV2["patch_size"]
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, (DINOV2["image_size"] // patch) ** 2 + 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **_linear("layernorm", (width,)),
    }
    attention = tuple(f"attention.attention.{part}" for part in ("query", "key", "value")) + (
        "attention.output.dense",
    )
    for layer in range(DINOV2["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        shapes |= _block(prefix, ("norm1", "norm2"), attention, width, width * DINOV2["mlp_ratio"])
        shapes |= {f"{prefix}.layer_scale{i}.lambda1": (width,) for i in (1, 2)}
    return _write(folder, DINOV2, shapes, seed)


def _linear(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _block(
    prefix: str, norms: tuple, attention: tuple, width: int, mlp: int
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name in norms:
        shapes |= _linear(f"{prefix}.{name}", (width,))
    for name in attention:
        shapes |= _linear(f"{prefix}.{name}", (width, width))
    return (
        shapes
        | _linear(f"{prefix}.mlp.fc1", (mlp, width))
        | _linear(f"{prefix}.mlp.fc2", (width, mlp))
    )


def _write(
    folder: Path,
    fields: dict,
    shapes: dict[str, tuple],
    seed: int,
    dtype: Any = np.float32,
    num_shards: int = 1,
) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {name: _draw(rng, name, shapes[name]).astype(dtype) for name in sorted(shapes)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(num_shards):
        names = sorted(tensors)[shard::num_shards]
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """No gain is 1 and no bias 0, and signals neither vanish nor explode: leaving any part out
    shows."""
    noise = rng.standard_normal(shape)
    if len(shape) == 1 and "bias" not in name:
        return 1 + 0.3 * noise
    return (
        noise * 0.3
        if len(shape) == 1
        else noise / np.sqrt(shape[-1] if len(shape) == 2 else np.prod(shape[1:]))
    )
