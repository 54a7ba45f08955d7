"""Your own documents on a laptop: the whole path of `documents`, to see it and not to learn, in
10 min on two idle cores, two to three times that beside other work.

    align   the connector alone is trained to transcribe pages
    answer  the connector alone is trained to answer and transcribe

SmolLM2 and DINOv2 stay as they are, and a page is one tile of 224 pixels, at which nobody could
read an A4 page. What it shows before an accelerator is paid for: that the data are taken, that the
loss falls, what checkpoints, evaluation, answers and the report look like. `--config=documents`
learns.
"""

import ml_collections

from alignvlm_jax.configs import documents, finetune


def get_config(folder: str = "weights/smollm2") -> ml_collections.ConfigDict:
    """Returns the stages of `documents` from the checkpoint in `folder`, small and few steps."""
    config = documents.get_config(folder)
    config.name = "trial"
    # CPUs compute in float32: bfloat16 is emulated.
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.record_tiles = 1
    config.data.max_tiles = 1
    config.data.seq_len = finetune.packed_length(folder, 1, 768)
    config.train.batch_size = 1
    config.train.num_steps = 15
    config.train.trainable = ("connector/.*",)
    config.train.log_every = 5
    config.train.validation_sequences = 4
    config.optim.warmup_steps = 2
    config.optim.learning_rate = 1e-3
    config.eval.num_questions = 8
    config.eval.batch_size = 8
    config.eval.max_new_tokens = 16
    for stage in config.stages.values():
        stage.train = {}
        stage.optim = {}
        stage.data = {"tasks": dict(stage.data.tasks)}
    return config
