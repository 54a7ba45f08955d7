"""The demonstration: a model of one million parameters learns to read forms, receipts and tables, on a laptop.

    stage0  the language model alone learns to transcribe and to look up, from the text of documents laid out on the
            patch grid: it stands in for a pretrained LLM, which brings this along
    stage1  alignment: the whole model transcribes pages
    stage2  the whole model transcribes and answers
    stage3  answers only; the vision encoder is frozen

`configs/demo.py:mlp` is the same with the MLP connector.
"""

import ml_collections

from alignvlm_jax import config as config_lib
from alignvlm_jax import presets


def get_config(connector: str = "align") -> ml_collections.ConfigDict:
    """Returns the four stages with the given connector."""
    config = config_lib.default_config_dict()
    config.name = "demo"
    config_lib.set_preset(config.model.vision, presets.VISION["tiny"])
    config_lib.set_preset(config.model.llm, presets.LLM["tiny"])
    config.model.connector.name = connector
    config.model.scan_unroll = 3
    config.data.dir = "data/demo"
    config.data.row_length = 144
    config.data.max_tiles = 2
    config.train.batch_size = 32
    transcribe = {"transcribe": 1.0}
    both = {"transcribe": 0.4, "answer": 0.6}
    answer = {"answer": 1.0}
    config.stages = ml_collections.ConfigDict(
        {
            "stage0": {
                "data": {"tasks": both},
                "train": {"num_steps": 600, "visual_input": "labels", "trainable": ("llm/.*",)},
            },
            "stage1": {"data": {"tasks": transcribe}, "train": {"num_steps": 400, "load": ("llm/.*",)}},
            "stage2": {"data": {"tasks": both}, "train": {"num_steps": 600}},
            "stage3": {
                "data": {"tasks": answer},
                "train": {"num_steps": 200, "trainable": ("connector/.*", "llm/.*")},
                "optim": {"learning_rate": 5e-4},
            },
        }
    )
    return config
