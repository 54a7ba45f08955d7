"""Presets of vision encoders and LLMs, by the names under which they were published.

A new preset is an entry of `VISION` or `LLM`.
"""

import dataclasses

from alignvlm_jax.config import LLMConfig, RopeScaling, VisionConfig

_B16 = VisionConfig(
    tile_height=224,
    tile_width=224,
    patch_height=16,
    patch_width=16,
    width=768,
    mlp_width=3072,
    num_layers=12,
    num_heads=12,
)
_L16 = dataclasses.replace(_B16, width=1024, mlp_width=4096, num_layers=24, num_heads=16)
_SO400M_16 = dataclasses.replace(_B16, width=1152, mlp_width=4304, num_layers=27, num_heads=16)
_SO400M_14 = dataclasses.replace(_SO400M_16, patch_height=14, patch_width=14)
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
_QWEN25 = LLMConfig(
    vocab_size=151936,
    width=896,
    mlp_width=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    rope_theta=1000000.0,
    qkv_bias=True,
)
_QWEN3 = LLMConfig(
    vocab_size=151936,
    width=1024,
    mlp_width=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope_theta=1000000.0,
    qk_norm=True,
)


def _resolutions(name: str, encoder: VisionConfig, *sizes: int) -> dict[str, VisionConfig]:
    """An encoder for tiles of each of the published sizes, in pixels.

    Of 384 pixels 27 patches of 14 leave 6 that no patch sees: the tile is the part that they see.
    """
    patch = encoder.patch_height
    tiles = {size: size // patch * patch for size in sizes}
    return {
        f"{name}_{size}": dataclasses.replace(encoder, tile_height=tile, tile_width=tile)
        for size, tile in tiles.items()
    }


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
    # A text line of any type size, a letter a patch at most; pixels of mean and deviation as above.
    "lines": VisionConfig(
        tile_height=16,
        # A line's last tile is blank at its end: 42 patches of 100 are blank, and 64 at 520 pixels.
        tile_width=260,
        patch_height=16,
        # Few letters are narrower: of 100 patches with letters one has two, and 18 at 8 pixels.
        patch_width=5,
        width=256,
        mlp_width=1024,
        num_layers=5,
        num_heads=4,
        gelu="exact",
        pixel_mean=(0.94, 0.94, 0.94),
        pixel_std=(0.19, 0.19, 0.19),
    ),
    **_resolutions("siglip_b16", _B16, 224, 256, 384, 512),
    **_resolutions("siglip_l16", _L16, 256, 384),
    # The last two are PaliGemma's.
    **_resolutions("siglip_so400m_14", _SO400M_14, 224, 384, 448, 896),
    **_resolutions("siglip2_b16", _B16, 224, 256, 384, 512),
    **_resolutions("siglip2_b32", dataclasses.replace(_B16, patch_height=32, patch_width=32), 256),
    **_resolutions("siglip2_l16", _L16, 256, 384, 512),
    **_resolutions("siglip2_so400m_14", _SO400M_14, 224, 384),
    **_resolutions("siglip2_so400m_16", _SO400M_16, 256, 384, 512),
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
    "qwen25_0.5b": _QWEN25,
    "qwen25_1.5b": dataclasses.replace(
        _QWEN25, width=1536, mlp_width=8960, num_layers=28, num_heads=12, head_dim=128
    ),
    "qwen25_7b": dataclasses.replace(
        _QWEN25,
        vocab_size=152064,
        width=3584,
        mlp_width=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        tie_embeddings=False,
    ),
    "qwen3_0.6b": _QWEN3,
    "qwen3_1.7b": dataclasses.replace(_QWEN3, width=2048, mlp_width=6144),
    "qwen3_4b": dataclasses.replace(
        _QWEN3, width=2560, mlp_width=9728, num_layers=36, num_heads=32
    ),
    "qwen3_8b": dataclasses.replace(
        _QWEN3, width=4096, mlp_width=12288, num_layers=36, num_heads=32, tie_embeddings=False
    ),
    "smollm3_3b": LLMConfig(
        vocab_size=128256,
        width=2048,
        mlp_width=11008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        norm_eps=1e-6,
        rope_theta=5000000.0,
        no_rope_every=4,
    ),
}
