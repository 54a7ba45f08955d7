"""The checkpoint that a run starts from, made of published towers or of an exported model."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from alignvlm_jax.data import chat_template, stage_data, tokenizers
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, restore, state, warm_start
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import Params, TrainState
from alignvlm_jax.weights import exported, load
from alignvlm_jax.weights.source import Tower

TOKENIZER = tokenizers.CONVERTED
"""Folder of the tokenizer's files in what `write` writes."""

STAGE = "convert"
"""Name of the stage of what `write` writes: nothing of it was trained here."""

SEQ_LEN = 4096
MAX_TILES = 9


def make_config(llm: Tower, vision: Tower, connector: str, out: Path) -> Config:
    """Returns the config of a checkpoint in `out`: the towers' sizes, and sequences that hold a
    page of up to nine tiles, no longer than the language model was published for."""
    model = ModelConfig(
        vision=vision.config,
        llm=llm.config,
        connector=config_lib.connector(connector),
        # One beyond the table: a placeholder that no tokenizer knows, so that no text can make an
        # image token.
        image_token_id=llm.config.vocab_size,
    )
    # Beyond its context length a model without rotary scaling answers nonsense.
    length = min(SEQ_LEN, llm.config.context_length or SEQ_LEN)
    # A page may take three quarters of a sequence; where one tile alone is more, the sequence
    # grows.
    max_tiles = max(1, min(MAX_TILES, length * 3 // 4 // model.tokens_per_tile))
    seq_len = max(length, max_tiles * model.tokens_per_tile * 4 // 3)
    data = DataConfig(
        # It is trained on nothing: what asks it about a split names the folder with --data.
        dir="data",
        tokenizer=str(out / TOKENIZER),
        seq_len=seq_len,
        max_tiles=max_tiles,
        use_overview=max_tiles > 1,
    )
    # Nothing is trained, but a config without these is none.
    train = TrainConfig(num_steps=1, batch_size=1)
    optim = OptimConfig(learning_rate=1e-5)
    return config_lib.check(
        Config(name=out.name, stage=STAGE, model=model, data=data, train=train, optim=optim)
    )


def write(
    llm: Tower, vision: Tower, config: Config, write_tokenizer: Callable[[Path], None], out: Path
) -> Table:
    """Writes the checkpoint of step 0 of the workdir `out`, which appears whole or not at all.

    Parameters keep the dtypes of their files; the connector's are float32, but for what starts from
    the LLM.

    Args:
      write_tokenizer: writes the tokenizer's files into a folder that is not there yet.

    Returns:
      The table of what was loaded, initialised and ignored.

    Raises:
      UserError: `out` exists, a tensor is missing, unexplained or damaged, or the tokenizer does
        not fit the model.
    """
    with storage.whole_folder(out) as staging:
        with storage.local_folder(staging) as folder:
            write_tokenizer(folder / TOKENIZER)
        data = dataclasses.replace(config.data, tokenizer=str(staging / TOKENIZER))
        # For what they raise, while nothing large was read: a tokenizer of another size or without
        # a chat format.
        chat_template.format_of(stage_data.load_tokenizer(data, config.model))
        model = vlm.VLM(config.model)
        # Parameters that one device could not hold are spread over all.
        mesh = mesh_lib.widest(config.model)
        with mesh_lib.use(mesh):
            abstract = state.abstract_params(model, mesh)
            params, table = _params(llm, vision, model, abstract, jax.random.key(config.seed))
        storage.write_whole(
            staging / "config.json", json.dumps(config_lib.to_json((config,)), indent=2) + "\n"
        )
        metadata = checkpoint.describe((config,), config, train_seconds=0.0, answer_loss=None)
        _save(staging, 0, params, metadata)
    return table


def _save(workdir: Path, step: int, params: Params, metadata: Mapping[str, Any]) -> None:
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    # In gigabytes of 10^9 bytes: room for one parameter at a time, the largest of them included.
    with Checkpoints(workdir / checkpoint.FOLDER, host_gb=1.1 * largest / 1e9) as checkpoints:
        checkpoints.save(
            step,
            # Without optimizer state: a run that starts here makes its own.
            TrainState(np.int32(step), params, ()),
            position={"next_sequence": 0},
            metadata=metadata,
            metrics=None,
        )


def _params(
    llm: Tower, vision: Tower, model: vlm.VLM, abstract: Params, rng: jax.Array
) -> tuple[Params, Table]:
    wanted = state.flatten(abstract)
    ignored = {
        f"{component}/{name}": tower.source.tensors[name].shape
        for component, tower in (("vision", vision), ("llm", llm))
        for name in load.check_tower(tower, wanted)
    }
    # Both towers were checked: no complaint about the second comes after the first was read.
    leaves = load.load_tower(vision, wanted) | load.load_tower(llm, wanted)
    initialised = wanted.keys() - leaves.keys()
    derived = initialised & vlm.llm_derived_paths(model.config, abstract["llm"])
    # What starts from the LLM is made below, of the LLM that was loaded and not of one just drawn.
    initialised_params = state.init_params(model, abstract, initialised - derived, rng)
    params = state.merge(state.unflatten(leaves), initialised_params)
    # In the precision of the LLM's file: a copy of its head in float32 would hold nothing more.
    made = jax.eval_shape(functools.partial(vlm.llm_derived, model.config), params["llm"])
    half = {path: wanted[path].update(dtype=made[path].dtype) for path in derived}
    abstract = state.merge(abstract, state.unflatten(half))
    params = warm_start.remake_llm_derived(model.config, params, abstract, initialised)
    shapes = {path: x.shape for path, x in wanted.items()}
    groups = {
        "loaded": {path: shapes[path] for path in shapes if not path.startswith("connector/")},
        "initialised": {path: shapes[path] for path in shapes if path.startswith("connector/")},
        "ignored in the files": ignored,
    }
    return params, warm_start.table(groups)


def write_import(path: Path, out: Path) -> Config:
    """Writes an exported model as the one checkpoint of the workdir `out`, which appears whole or
    not at all, with every number as it stands in the export; returns its config.

    Raises:
      UserError: `out` exists, or `path` is no exported model, or a damaged one.
    """
    storage.refuse_existing(out)
    model = exported.Exported(path)
    found = model.config(model.step)
    data = dataclasses.replace(found.data, tokenizer=str(out / TOKENIZER))
    config = dataclasses.replace(found, data=data)
    with storage.whole_folder(out) as staging:
        with storage.local_folder(staging) as folder:
            (folder / TOKENIZER).mkdir()
            for name, content in model.tokenizer(model.step).items():
                (folder / TOKENIZER / name).write_bytes(content)
        stage_data.load_tokenizer(
            dataclasses.replace(data, tokenizer=str(staging / TOKENIZER)), config.model
        )
        mesh = mesh_lib.widest(config.model)
        with mesh_lib.use(mesh):
            _, _, params, step = restore.read_model(mesh, model, model.step)
        stages = config_lib.to_json((config,))
        storage.write_whole(staging / "config.json", json.dumps(stages, indent=2) + "\n")
        described = checkpoint.describe((config,), config, train_seconds=0.0, answer_loss=None)
        metadata = described | model.metadata(step) | {"config": stages}
        _save(staging, step, params, metadata)
    return config


def num_sequences(metadata: Mapping[str, Any], step: int, paths: Iterable[str]) -> int | None:
    """Returns how many sequences with pages the connector of a checkpoint has been trained on.

    Args:
      metadata: of the checkpoint.
      step: of the run that wrote it.
      paths: of the parameters.

    Returns:
      None where it began with the connector of a run that is not there any more.
    """
    if "num_sequences" in metadata:  # Of an exported model, which knows no other runs.
        return metadata["num_sequences"]
    if metadata["stage"] == STAGE:
        return 0
    # Of all stages of the run: the checkpoint may be of any.
    stages = config_lib.from_json(metadata["config"])
    seen = 0
    # A connector that was not loaded is as new as the run, whatever that began with.
    connector = [path for path in paths if path.startswith("connector/")]
    if stages[0].init_from and any(
        re.fullmatch(pattern, path) for pattern in stages[0].train.load for path in connector
    ):
        try:
            before = exported.read(
                storage.path(stages[0].init_from), lambda found, step: (found.metadata(step), step)
            )
        except (UserError, OSError):
            return None
        seen = num_sequences(*before, connector)
    for stage in stages:
        # What is left of `step` counts from the begin of the stage.
        is_last = stage.stage == metadata["stage"]
        steps = step if is_last else stage.train.num_steps
        if seen is not None and stage.train.visual_source == "pixels":
            seen += steps * stage.train.batch_size
        if is_last:
            break
        step -= steps
    return seen
