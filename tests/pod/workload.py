"""What the pods of the tests train on and with: two small packed sources, a tiny model, questions
and texts."""

from pathlib import Path

import numpy as np

from alignvlm_jax.commands import config_flag
from alignvlm_jax.data import index, shards
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer as Tokenizer
from alignvlm_jax.models import vlm
from alignvlm_jax.train import checkpoint
from alignvlm_jax.train.state import TrainState
from tests.conftest import EVAL_QUESTION, random_params, random_record

BATCH_SIZE = 32
NUM_STEPS = 4
START = "start"
HEAD = """
import ml_collections
from alignvlm_jax import config as config_lib

def get_config():
    config = config_lib.default_config_dict()
    config.init_from = {folder!r} + "/start"
    config.model.vision.update(
        tile_height=8, tile_width=16, patch_height=4, patch_width=4, width=16, mlp_width=32, num_layers=2, num_heads=4
    )
    config.model.llm.update(
        vocab_size=112, width=16, mlp_width=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4
    )
    config.model.image_token_id = 4
    config.data.update(
        dir={folder!r}, packing="offline", seq_len=80, max_tiles=4, record_tiles=2, max_unsupervised=1.0,
        tasks={{"answer": 1.0}},
    )
    config.data.sources = {{"a": {{"dir": {folder!r}, "weight": 2.0}}, "b": {{"dir": {folder!r} + "/b"}}}}
"""
"""Of a config: the model, and the data in a folder."""
CONFIG = (
    HEAD
    + """    config.train.update(
        num_steps={steps}, batch_size={batch}, log_every=1, validate_every=2, validation_sequences=64, generate_every=4,
        generate_questions=9, checkpoint_every=2,
    )
    config.optim.update(learning_rate=1e-3, warmup_steps=1)
    config.eval.update(splits=("validation",), num_questions=23, batch_size=16, max_new_tokens=6)
    return config
"""
)


def write(folder: Path) -> Path:
    """Writes the data, and the config; returns its path."""
    rng = np.random.default_rng(0)
    for name, source, counts in (("", "form", (150, 23)), ("b", "table", (90, 11))):
        directory = folder / name
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.train(
            directory / "tokenizer.model", [EVAL_QUESTION, "Who? Ann a b", "0123456789"]
        )
        fingerprint = index.tokenizer_fingerprint(directory)
        for split, count in zip(("train", "validation"), counts, strict=True):
            records = [random_record(rng, f"{source}-{split}-{i}", source) for i in range(count)]
            shard = directory / shards.shard_name(split, 0, 1)
            shards.write_shard(shard, records)
            index.write(index.index_path(shard), index.of_records(records, tokenizer, fingerprint))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "debian").symlink_to(folder)
    config = write_config(folder / "config.py", str(folder))
    write_start(config, folder / START)
    return config


def write_config(path: Path, folder: str) -> Path:
    """Writes the config for data in `folder`, which may be in a bucket; returns its path."""
    path.write_text(CONFIG.format(folder=folder, steps=NUM_STEPS, batch=BATCH_SIZE))
    return path


def write_start(config: Path, workdir: Path) -> None:
    """A checkpoint to start from, of a model that answers otherwise about every page: a swap of two
    would show."""
    [stage], _ = config_flag.parse([f"--config={config}"])
    params = random_params(
        vlm.VLM(stage.model), vlm.abstract_batch(stage.model, stage.data, stage.train.batch_size)
    )
    metadata = checkpoint.describe((stage,), stage, train_seconds=0.0, answer_loss=None)
    with checkpoint.Checkpoints(workdir / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(
            1,
            TrainState(np.int32(1), params, ()),
            position={"next_sequence": 0},
            metadata=metadata,
            metrics=None,
        )


def train(config: Path, workdir: str | Path, mesh: tuple[int, int, int], *flags: str) -> list[str]:
    """Returns the command that trains on a mesh."""
    return ["train", f"--config={config}", f"--workdir={workdir}", *mesh_flags(mesh), *flags]


def mesh_flags(mesh: tuple[int, int, int]) -> list[str]:
    """Returns the flags that ask for a mesh (data, fsdp, tensor)."""
    return [
        f"--config.mesh.{axis}={size}"
        for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    ]
