"""SmolLM2-135M-Instruct and DINOv2 ViT-S/14, joined by ALIGN.

`make weights` puts them into weights/smollm2. For one accelerator, or a few; on a laptop a step
takes a minute.
"""

import ml_collections

from alignvlm_jax.configs import finetune


def get_config(folder: str = "weights/smollm2") -> ml_collections.ConfigDict:
    """Returns the stages that start from the checkpoint in `folder`, as `make weights` wrote it."""
    config = finetune.get_config(folder)
    config.name = "smollm2"
    return config
