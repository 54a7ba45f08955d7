"""The paper's low-resource study (section 5.2.2, table 3), with any connector.

It trains Llama 3.2 3B in LLaVA-NeXT's two stages.

    stage1_connector  LLaVA-558K captions: the connector alone, 1e-3, batch 32, one epoch
    stage2_all        LLaVA-NeXT-779K: LLM and connector at 1e-5, the encoder at 2e-6, batch 8,
                      one epoch

`--config=low_resource:align` (or another). The paper does not say whether its batches are of a
device or of all: here they are of all. It uses LLaVA's grids of up to 6 x 6 tiles within nine; here
they are those of `data.images`. Optimizer: as in `paper.py`. Start from published weights:
--config.init_from=weights/mine
"""

import math

import ml_collections

from alignvlm_jax import config as config_lib
from alignvlm_jax.configs import paper

CAPTIONS = 558_000
INSTRUCTIONS = 779_000


def get_config(connector: str = "align") -> ml_collections.ConfigDict:
    """Returns both stages, with a connector of this name."""
    config = config_lib.default_config_dict()
    config.name = f"low_resource_{connector}"
    paper.set_model(config, "llama32_3b")
    config.model.connector.name = connector
    config.data.max_tiles = paper.MAX_TILES
    config.data.use_overview = True
    # One record, of all tiles and 2,048 tokens of text: a batch of 8 is too small to pack.
    config.data.seq_len = 19 * paper.BLOCK
    config.data.tasks = {"answer": 1.0}
    config.train.patch_token_weight = 0.0
    config.train.validate_every = config.train.checkpoint_every = 1000
    paper.set_optimizer(config, 1e-5)
    config.stages = {
        "stage1_connector": {
            "data": {"dir": "data/llava_558k"},
            "train": {
                "num_steps": CAPTIONS // 32,
                "batch_size": 32,
                "trainable": ("connector/.*",),
            },
            "optim": {"learning_rate": 1e-3, "warmup_steps": math.ceil(0.03 * (CAPTIONS // 32))},
        },
        "stage2_all": {
            "data": {"dir": "data/llava_next_779k"},
            "train": {"num_steps": INSTRUCTIONS // 8, "batch_size": 8},
            "optim": {
                "learning_rate_scale": {"vision": 0.2},
                "warmup_steps": math.ceil(0.03 * (INSTRUCTIONS // 8)),
            },
        },
    }
    return config
