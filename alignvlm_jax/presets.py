"""Named sizes of towers. Adding one is one entry."""

from alignvlm_jax.config import LLMConfig, VisionConfig

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
        # Of the demonstration's pages: white with thin strokes is learnt from faster when normalised by its own.
        pixel_mean=(0.94, 0.94, 0.94),
        pixel_std=(0.19, 0.19, 0.19),
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
        rope_theta=1000.0,  # Rows are two hundred tokens at most.
    ),
}
