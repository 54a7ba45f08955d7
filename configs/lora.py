"""Fine-tuning by LoRA from published weights or from any checkpoint, `--config=lora:DIR`.

    align   the connector and the factors learn to transcribe pages
    answer  both learn to answer

As `finetune`, but both towers stay as they are: trained are the connector, and narrow factors that
are added to kernels of the language model (`config.lora`). What is frozen may be held in bfloat16,
as most published weights are, in half of the memory:
--config.train.bfloat16_params="('llm/.*', 'vision/.*')".
"""

import ml_collections

from alignvlm_jax.configs import finetune


def get_config(folder: str) -> ml_collections.ConfigDict:
    """Returns the stages of `finetune` from the checkpoint in `folder`, with LoRA."""
    config = finetune.get_config(folder)
    config.name = "lora"
    set_lora(config)
    return config


def set_lora(config: ml_collections.ConfigDict) -> None:
    """Has all stages of a fine-tuning train the connector and LoRA's factors alone."""
    config.lora.rank = 16
    config.train.trainable = ("connector/.*",)
    for stage in config.stages.values():
        stage.train = {"num_steps": stage.train.num_steps}
        # Factors and connector bear the same rate, in both stages.
        stage.optim = {}
