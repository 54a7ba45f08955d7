"""Checkpoints to be exported: the tiny model with any connector and rows that only pad its
vocabulary."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax.data import tokenizers
from alignvlm_jax.models import vlm
from alignvlm_jax.train import checkpoint, restore
from alignvlm_jax.train import state as train_state
from tests.conftest import random_params, tiny_connector


def write_workdir(
    folder: Path, trained_workdir: Path, connector: str, seed: int = 0, **model_changes: Any
) -> config_lib.Config:
    """Writes a workdir with a checkpoint of random weights at step 7, whose data are those of
    `trained_workdir`; returns its config."""
    config = restore.load_config(trained_workdir)
    num_tokens = tokenizers.load(trained_workdir).vocab_size
    # A multiple of 4 for the mesh, with a few rows to spare.
    vocab_size = num_tokens // 4 * 4 + 8
    padded_rows = vocab_size - num_tokens
    llm = dataclasses.replace(config.model.llm, vocab_size=vocab_size, padded_rows=padded_rows)
    options = {"connector": tiny_connector(connector), "llm": llm} | model_changes
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **options))
    batch = vlm.abstract_batch(config.model, config.data, config.train.batch_size)
    params = random_params(vlm.VLM(config.model), batch, seed=seed)
    with checkpoint.Checkpoints(folder / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(
            7,
            train_state.TrainState(np.int32(7), params, ()),
            position={"next_sequence": 56},
            metadata=checkpoint.describe((config,), config, train_seconds=12.5, answer_loss=None),
            metrics=None,
        )
    return config
