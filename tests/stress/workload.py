"""What the runs of the stress test train: four stages on two small sources that are mixed and
packed."""

import shutil
from pathlib import Path

from tests.pod import workload as pod_workload

NUM_STEPS = (6, 4, 8, 6)
"""Of the stages."""
TOTAL = sum(NUM_STEPS)
BATCH_SIZE = 8
ENDS = tuple(sum(NUM_STEPS[: i + 1]) for i in range(len(NUM_STEPS)))

CONFIG = (
    pod_workload.HEAD
    + """    config.train.update(
        batch_size={batch}, log_every=1, validate_every=3, validation_sequences=16, generate_questions=4,
        checkpoint_every=2, keep_checkpoints=2,
    )
    config.optim.update(learning_rate=1e-3, warmup_steps=1)
    config.stages = ml_collections.ConfigDict(dict(
        stage0={{"train": {{"num_steps": {steps[0]}, "visual_source": "oracle", "trainable": ("llm/.*",)}}}},
        stage1={{"train": {{"num_steps": {steps[1]}, "load": ("llm/.*",), "trainable": ("connector/.*",)}}}},
        stage2={{"train": {{"num_steps": {steps[2]}, "generate_every": 4}}, "data": {{"seq_len": 96}}}},
        stage3={{
            "train": {{"num_steps": {steps[3]}, "generate_every": 3, "trainable": ("connector/.*", "llm/.*")}},
        }},
    ))
    return config
"""
)


def write(folder: Path) -> Path:
    """Writes the data and a model to start from into `folder`, and beside it the config; returns
    its path."""
    pod_workload.write(folder)
    # Questions about it are not asked here, and the link to itself would be copied into buckets.
    shutil.rmtree(folder / "tasks")
    return write_config(folder.with_suffix(".py"), str(folder))


def write_one_stage(path: Path, folder: str, num_steps: int) -> Path:
    """Writes a config of a single stage, which reads pixels and answers; returns its path."""
    text = CONFIG.format(folder=folder, steps=NUM_STEPS, batch=BATCH_SIZE)
    head, _, _ = text.partition("    config.stages")
    path.write_text(f"{head}    config.train.num_steps = {num_steps}\n    return config\n")
    return path


def write_config(path: Path, folder: str) -> Path:
    """Writes the config for data in `folder`, which may be in a bucket; returns its path."""
    path.write_text(CONFIG.format(folder=folder, steps=NUM_STEPS, batch=BATCH_SIZE))
    return path
