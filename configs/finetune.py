"""Fine-tuning from published weights or from any checkpoint, `--config=finetune:DIR`.

DIR is a folder that `convert` wrote, or a workdir.

    align   the paper's stage 1: the whole model is trained, which aligns the connector
    answer  the paper's stage 3: the vision encoder is frozen

The model is that of DIR, with its tokenizer, and computes in bfloat16 as accelerators do it fast
(--config.model.dtype=float32 for a CPU). A page is one tile, as strips of the demonstration's data
need no more; `documents` cuts whole pages into tiles. Data and steps are for the user to set.
"""

import json
import math
import pathlib

import ml_collections

from alignvlm_jax import config as config_lib
from alignvlm_jax.configs import demo
from alignvlm_jax.data import tokenizers

BLOCK = 128
"""Tokens that attention kernels work on at a time."""


def get_config(folder: str) -> ml_collections.ConfigDict:
    """Returns the stages that start from the checkpoint in `folder`.

    Raises:
      ValueError: the folder has no config.json, or that of another program.
    """
    config = config_lib.default_config_dict()
    config.name = "finetune"
    config.init_from = folder
    last = _last_stage(folder)
    config_lib.set_model(config.model, last["model"])
    config.model.remat = "full"
    config.model.dtype = "bfloat16"
    beside = tokenizers.of_converted(pathlib.Path(folder))
    config.data.tokenizer = str(beside) if beside else last["data"]["tokenizer"]
    config.data.dir = demo.DATA
    config.data.max_tiles = 1
    config.data.use_overview = False
    config.data.seq_len = tokens_per_tile(folder) + 256
    config.train.batch_size = 8
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 20
    config.stages = ml_collections.ConfigDict(
        {
            "align": {"data": {"tasks": {"transcribe": 1.0}}, "train": {"num_steps": 500}},
            "answer": {
                "data": {"tasks": {"answer": 1.0}},
                "train": {"num_steps": 500, "trainable": ("connector/.*", "llm/.*")},
                "optim": {"learning_rate": 2e-5},
            },
        }
    )
    return config


def tokens_per_tile(folder: str) -> int:
    """Returns how many visual tokens the model in `folder` makes of a tile."""
    (stage,) = config_lib.from_json([_last_stage(folder)])
    return stage.model.tokens_per_tile


def packed_length(folder: str, num_tiles: int, num_text_tokens: int) -> int:
    """Returns the length of a packed sequence that has room for so many tiles and text tokens, as a
    multiple of what attention kernels work on."""
    length = num_tiles * tokens_per_tile(folder) + num_text_tokens
    return math.ceil(length / BLOCK) * BLOCK


def _last_stage(folder: str) -> dict:
    """Returns the last stage of the run in `folder`, whose model its checkpoint has; see
    `get_config`."""
    path = pathlib.Path(folder, "config.json")
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json: run `make weights` or `convert` first")
    stages = json.loads(path.read_text())
    if not isinstance(stages, list):
        raise ValueError(
            f"{path} is no run's: `convert --import` makes a checkpoint of an exported model, and "
            "`convert --llm --vision` one of models of Hugging Face"
        )
    # Earlier versions called some fields otherwise.
    return config_lib.current_form(stages)[-1]
