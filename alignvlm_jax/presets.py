"""Named sizes of towers. Adding one is one entry."""

from alignvlm_jax.config import LLMConfig, VisionConfig

VISION = {
    "tiny": VisionConfig(),
}

LLM = {
    "tiny": LLMConfig(),
}
