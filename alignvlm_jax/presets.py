"""Presets of vision encoders and LLMs, by the names under which they were published.

A new preset is an entry of `VISION` or `LLM`.
"""

import dataclasses

from alignvlm_jax.config import LLMConfig, RopeScaling, VisionConfig

# Published for 384 pixels, which are 27 patches of 14 and 6 more that no patch sees: the tile is
# the part that patches see.
_SO400M = VisionConfig(
    tile_height=378,
    tile_width=378,
    patch_height=14,
    patch_width=14,
    width=1152,
    mlp_width=4304,
    num_layers=27,
    num_heads=16,
)
_LLAMA3 = LLMConfig(
    vocab_size=128256,
    width=2048,
    mlp_width=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(factor=32.0),
)
_SMOLLM2 = LLMConfig(
    vocab_size=49152,
    width=576,
    mlp_width=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
)

VISION = {
    "tiny": VisionConfig(
        tile_height=32,
        tile_width=128,
        patch_height=16,
        patch_width=8,
        width=128,
        mlp_width=384,
        num_layers=3,
        num_heads=4,
        # Those of the demonstration's pages: white with thin strokes is learnt faster when it is
        # normalised by its own statistics.
        pixel_mean=(0.94, 0.94, 0.94),
        pixel_std=(0.19, 0.19, 0.19),
    ),
    "siglip_b16_224": VisionConfig(
        tile_height=224,
        tile_width=224,
        patch_height=16,
        patch_width=16,
        width=768,
        mlp_width=3072,
        num_layers=12,
        num_heads=12,
    ),
    "siglip_so400m_14_384": _SO400M,
    "siglip2_so400m_14_384": _SO400M,
    "siglip2_so400m_16_384": dataclasses.replace(
        _SO400M, tile_height=384, tile_width=384, patch_height=16, patch_width=16
    ),
    "dinov2_s14_224": VisionConfig(
        tile_height=224,
        tile_width=224,
        patch_height=14,
        patch_width=14,
        width=384,
        mlp_width=1536,
        num_layers=12,
        num_heads=6,
        gelu="exact",
        pixel_mean=(0.485, 0.456, 0.406),
        pixel_std=(0.229, 0.224, 0.225),
    ),
}

LLM = {
    "tiny": LLMConfig(
        vocab_size=128,
        width=128,
        mlp_width=256,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=1000.0,  # packed sequences have at most two hundred tokens
    ),
    "smollm2_135m": _SMOLLM2,
    "smollm2_360m": dataclasses.replace(
        _SMOLLM2, width=960, mlp_width=2560, num_layers=32, num_heads=15, num_kv_heads=5
    ),
    "smollm2_1.7b": dataclasses.replace(
        _SMOLLM2,
        width=2048,
        mlp_width=8192,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        rope_theta=130000.0,
    ),
    "llama32_1b": _LLAMA3,
    "llama32_3b": dataclasses.replace(
        _LLAMA3, width=3072, num_layers=28, num_heads=24, head_dim=128
    ),
    "llama31_8b": dataclasses.replace(
        _LLAMA3,
        width=4096,
        mlp_width=14336,
        num_layers=32,
        head_dim=128,
        rope_scaling=RopeScaling(factor=8.0),
        tie_embeddings=False,
    ),
}
