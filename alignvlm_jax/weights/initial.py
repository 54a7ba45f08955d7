"""The checkpoint that a run starts from, made of published towers; and a checkpoint written as
published formats."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from alignvlm_jax.data import chat_template, stage_data, tokenizers
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.train import checkpoint, restore, state, warm_start
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import Params, TrainState
from alignvlm_jax.weights import export, load
from alignvlm_jax.weights.source import Tower

TOKENIZER = tokenizers.CONVERTED
"""Folder of the tokenizer's files in what `write` writes."""

STAGE = "convert"
"""Name of the stage of what `write` writes: nothing of it was trained here."""

SEQ_LEN = 4096
MAX_TILES = 9


def make_config(llm: Tower, vision: Tower, connector: str, out: Path) -> Config:
    """Returns the config of a checkpoint in `out`: the towers' sizes, and sequences that hold a
    page of up to nine tiles."""
    model = ModelConfig(
        vision=vision.config,
        llm=llm.config,
        connector=config_lib.connector(connector),
        # One beyond the table: a placeholder that no tokenizer knows, so that no text can make an
        # image token.
        image_token_id=llm.config.vocab_size,
    )
    # A page may take three quarters of a sequence; where one tile alone is more, the sequence
    # grows.
    max_tiles = max(1, min(MAX_TILES, SEQ_LEN * 3 // 4 // model.tokens_per_tile))
    seq_len = max(SEQ_LEN, max_tiles * model.tokens_per_tile * 4 // 3)
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
        largest = max(x.nbytes for x in jax.tree.leaves(params))
        # In gigabytes of 10^9 bytes: room for one parameter at a time, the largest of them
        # included.
        with Checkpoints(staging / checkpoint.FOLDER, host_gb=1.1 * largest / 1e9) as checkpoints:
            metadata = checkpoint.describe((config,), config, train_seconds=0.0, answer_loss=None)
            checkpoints.save(
                0,
                # Without optimizer state: a run that starts here makes its own.
                TrainState(np.int32(0), params, ()),
                position={"next_sequence": 0},
                metadata=metadata,
                metrics=None,
            )
    return table


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
    from_llm = initialised & vlm.from_llm_paths(model.config, abstract["llm"])
    # What starts from the LLM is made below, of the LLM that was loaded and not of one just drawn.
    initialised_params = state.init_params(model, abstract, initialised - from_llm, rng)
    params = state.merge(state.unflatten(leaves), initialised_params)
    params = warm_start.from_llm(model.config, params, abstract, initialised)
    shapes = {path: x.shape for path, x in wanted.items()}
    groups = {
        "loaded": {path: shapes[path] for path in shapes if not path.startswith("connector/")},
        "initialised": {path: shapes[path] for path in shapes if path.startswith("connector/")},
        "ignored in the files": ignored,
    }
    return params, warm_start.table(groups)


def write_export(path: Path, out: Path, components: tuple[str, ...]) -> dict[str, int]:
    """Writes components of a checkpoint into the folder `out`, which appears whole or not at all.

    Args:
      path: a workdir, whose newest readable checkpoint is taken, or one checkpoint folder
        `checkpoints/STEP`.

    Returns:
      The number of tensors written, by component.

    Raises:
      UserError: `out` exists, there is no readable checkpoint, its tokenizer is missing, or a
        component cannot be expressed.
    """
    storage.refuse_existing(out)
    return restore.read_newest(
        path, lambda checkpoints, step: _write(checkpoints, step, out, components)
    )


def _write(
    checkpoints: Checkpoints, step: int, out: Path, components: tuple[str, ...]
) -> dict[str, int]:
    config = checkpoints.config(step)
    stored = checkpoints.stored_params(step)
    export.check(config.model, components)
    # One device will do, since parameters are read one at a time.
    mesh = mesh_lib.single_device()
    abstract = state.flatten(state.abstract_params(vlm.VLM(config.model), mesh))

    def read(path: str) -> np.ndarray:
        # In the dtype that is stored: what is not rounded on its way in must not be on its way out.
        wanted = jax.ShapeDtypeStruct(
            stored[path].shape, stored[path].dtype, sharding=abstract[path].sharding
        )
        return np.asarray(
            state.flatten(checkpoints.restore_params(step, state.unflatten({path: wanted})))[path]
        )

    with storage.whole_folder(out) as target, storage.local_folder(target) as staging:
        counts = export.write(config.model, stored, read, staging, components)
        if "llm" in components:
            for name, content in _tokenizer_files(checkpoints, step, config.data).items():
                (staging / "llm" / name).write_bytes(content)
    return counts


def _tokenizer_files(checkpoints: Checkpoints, step: int, data: DataConfig) -> dict[str, bytes]:
    path = stage_data.tokenizer_path(data)
    return checkpoints.tokenizer(step) or stage_data.tokenizer_files(tokenizers.load(path))
