"""Your own documents by LoRA: `documents` with both towers frozen, `--config=documents_lora:DIR`.

Trained are the connector, and narrow factors that are added to kernels of the language model, as
`lora` has them; tiles, lengths and stages are those of `documents`.
"""

import ml_collections

from alignvlm_jax.configs import documents, lora


def get_config(folder: str = "weights/smollm2") -> ml_collections.ConfigDict:
    """Returns the stages of `documents` from the checkpoint in `folder`, with LoRA."""
    config = documents.get_config(folder)
    config.name = "documents_lora"
    lora.set_lora(config)
    return config
