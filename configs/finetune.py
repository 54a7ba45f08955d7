"""Fine-tuning from published weights or from any checkpoint, `--config=finetune:DIR`.

DIR is a folder that `convert` wrote, or a workdir.

    align   the paper's stage 1: the whole model is trained, which aligns the connector
    answer  the paper's stage 3: the vision encoder is frozen

The model is that of DIR, with its tokenizer, and computes in bfloat16 as accelerators do it fast
(--config.model.dtype=float32 for a CPU). Data and steps are for the user to set; the defaults are
the demonstration's data.
"""

import json
import pathlib

import ml_collections

from alignvlm_jax import config as config_lib
from alignvlm_jax.configs import demo
from alignvlm_jax.data import tokenizers


def get_config(folder: str) -> ml_collections.ConfigDict:
    """Returns the stages that start from the checkpoint in `folder`.

    Raises:
      ValueError: the folder has no config.json, or that of another program.
    """
    config = config_lib.default_config_dict()
    config.name = "finetune"
    config.init_from = folder
    path = pathlib.Path(folder, "config.json")
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json: run `make weights` or `convert` first")
    stages = json.loads(path.read_text())
    if not isinstance(stages, list):
        raise ValueError(
            f"{path} is no run's: `convert --import` makes a checkpoint of an exported model, and "
            "`convert --llm --vision` one of models of Hugging Face"
        )
    # A config.json has a list of stages; the model is that of the last one.
    # Earlier versions called some fields otherwise.
    (*_, last) = config_lib.current_form(stages)
    config_lib.set_model(config.model, last["model"])
    config.model.remat = "full"
    config.model.dtype = "bfloat16"
    beside = tokenizers.of_converted(path.parent)
    config.data.tokenizer = str(beside) if beside else last["data"]["tokenizer"]
    config.data.dir = demo.DATA
    config.data.max_tiles = 1
    config.data.use_overview = False
    config.data.seq_len = config_lib.from_json([last])[0].model.tokens_per_tile + 256
    config.train.batch_size = 8
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 20
    config.eval.splits = demo.SPLITS
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
