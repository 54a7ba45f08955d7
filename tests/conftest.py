"""Eight CPU devices, and the smallest model that still has every part."""

import os

from tests import fast_xla

os.environ["JAX_PLATFORMS"] = "cpu"
# Forced here, not in each test: the number of devices is fixed at the first use of jax.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {fast_xla.FLAGS}"

from tests import typed

# Before the first import of the package: what is imported from here on is checked.
typed.install()

import dataclasses
import errno
import functools
import gc
import pathlib
import re
import signal
import zlib

import jax
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.data import images, record, shards
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer as Tokenizer
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import checkpoint
from alignvlm_jax.train import state as train_state
from tests.fake_bucket import FakeBucket

pytest_plugins = ["tests.prepared"]

# A shell starts background jobs with SIGINT ignored, which every process below would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Python looks for cycles rarely, and not among the modules and tests that stay: tracing makes
    so many objects that this was an eighth of the main thread's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def tiny_config(**changes) -> config_lib.Config:
    """A model of two layers and width 16; `changes` replace whole parts of the config."""
    model = config_lib.ModelConfig(
        vision=config_lib.VisionConfig(
            tile_height=8,
            tile_width=16,
            patch_height=4,
            patch_width=4,
            width=16,
            mlp_width=32,
            num_layers=2,
            num_heads=2,
        ),
        llm=config_lib.LLMConfig(
            vocab_size=32,
            width=16,
            mlp_width=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
        ),
        image_token_id=4,
    )
    base = config_lib.Config(
        model=model,
        data=config_lib.DataConfig(
            dir="data", seq_len=32, max_tiles=2, tasks={"transcribe": 0.5, "answer": 0.5}
        ),
        optim=config_lib.OptimConfig(learning_rate=2e-3),
        mesh=config_lib.MeshConfig(data=2, fsdp=2, tensor=2),
        train=config_lib.TrainConfig(num_steps=4, batch_size=8),
        eval=config_lib.EvalConfig(splits=("seen_fonts", "unseen_fonts")),
    )
    return dataclasses.replace(base, **changes)


TINY_CONNECTORS = {
    "perceiver": {"num_latents": 5, "num_layers": 2},
    "ovis": {"visual_vocab_size": 22},
    "c_abstractor": {"pooled_rows": 1, "pooled_columns": 3, "num_blocks": 2},
}


def tiny_connector(name: str) -> config_lib.ConnectorConfig:
    """Any of the connectors, small enough for tiles of 2 x 4 patches, and to be split over the 2 x
    2 x 2 mesh."""
    return config_lib.connector(name, **TINY_CONNECTORS.get(name, {}))


def random_batch(config: config_lib.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of random pixels and tokens: the image tokens first, then a question, an answer and
    padding."""
    rng = np.random.default_rng(seed)
    vision = config.model.vision
    data = config.data
    size = config.train.batch_size
    slots = data.max_tiles * config.tokens_per_tile
    patches = vision.num_patches
    tokens = rng.integers(8, config.model.llm.vocab_size, (size, data.seq_len)).astype(np.int32)
    lengths = rng.integers(slots + 8, data.seq_len + 1, size)
    index = np.arange(data.seq_len)
    tokens[:, :slots] = config.model.image_token_id
    is_token = index < lengths[:, None]
    tokens[~is_token] = 0
    targets = np.roll(tokens, -1, axis=1)
    is_answer = (index >= slots + 4) & (index < lengths[:, None] - 1)
    fractions = rng.random((size, data.max_tiles, patches, data.max_patch_labels)).astype(
        np.float32
    )
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_weights": is_answer.astype(np.float32),
        "positions": np.where(is_token, index, 0).astype(np.int32),
        "segment_ids": is_token.astype(np.int32),
        "tiles": rng.integers(
            0, 256, (size, data.max_tiles, vision.tile_height, vision.tile_width, 3), dtype=np.uint8
        ),
        "patch_label_ids": rng.integers(
            8, config.model.llm.vocab_size, (size, data.max_tiles, patches, data.max_patch_labels)
        ).astype(np.int32),
        "patch_label_weights": fractions / fractions.sum(-1, keepdims=True),
        "patch_loss_weights": np.ones((size, data.max_tiles, patches), np.float32),
    }


def random_params(module: nn.Module, *args, seed: int = 0, **kwargs) -> dict:
    """Parameters as after some training: no norm's gain is 1 and no bias 0, so that leaving one out
    shows. Drawn by numpy in the shapes that `module.init(rng, *args, **kwargs)` would give; nothing
    is compiled."""
    rng = np.random.default_rng(seed)
    boxed = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), *args)[
        "params"
    ]

    def draw(path, array) -> np.ndarray:
        noise = 0.3 * rng.standard_normal(array.shape)
        return (noise + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, sharding.unbox(boxed))


def matmul_dtypes(text: str) -> list[tuple[str, str, str]]:
    """Returns the element types of both operands and of the result of each matmul of a lowered
    program."""
    kind = r"tensor<(?:\d+x)+(\w+)>"
    return re.findall(rf"stablehlo\.dot_general .*: \({kind}, {kind}\) -> {kind}", text)


@pytest.fixture
def config() -> config_lib.Config:
    return tiny_config()


@pytest.fixture
def batch(config) -> dict[str, np.ndarray]:
    return random_batch(config)


@pytest.fixture
def mesh(config):
    """The 2 x 2 x 2 mesh, entered."""
    with mesh_lib.use(mesh_lib.make_mesh(config.mesh, config.model, config.train)) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def bucket():
    """A fake Cloud Storage server for this worker; all clients in this process and those it starts
    go there."""
    with FakeBucket() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        yield bucket


@pytest.fixture
def bucket_folder(bucket, request):
    """A folder of the test's own in the bucket."""
    return storage.path(f"{bucket.url}/{zlib.crc32(request.node.nodeid.encode()):08x}")


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path):
    """A folder on this machine, and one in a bucket."""
    return tmp_path if request.param == "local" else request.getfixturevalue("bucket_folder")


@pytest.fixture(
    params=[errno.EMFILE, errno.EXDEV, errno.ENOTSUP], ids=lambda number: errno.errorcode[number]
)
def unrenamed(request, monkeypatch):
    """A disk like a mounted bucket: files can be renamed, folders not."""

    def refusing(rename):
        def act(source, target, **kwargs):
            if os.path.isdir(source):
                raise OSError(request.param, os.strerror(request.param), os.fspath(source))
            return rename(source, target, **kwargs)

        return act

    monkeypatch.setattr(os, "rename", refusing(os.rename))
    monkeypatch.setattr(os, "replace", refusing(os.replace))


EVAL_QUESTION = "What is the total?"


@pytest.fixture(scope="session")
def trained_workdir(tmp_path_factory) -> pathlib.Path:
    """A workdir with a checkpoint of random weights at step 7, and its `data.dir`: documents of two
    questions."""
    root = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for split, count in (("seen_fonts", 5), ("unseen_fonts", 3)):
        records = [
            random_record(rng, f"{split}-{i}", ("form", "table")[i % 2]) for i in range(count)
        ]
        shards.write_shard(root / shards.shard_name(split, 0, 1), records)
    tokenizer = Tokenizer.train(root / "tokenizer.model", [EVAL_QUESTION, "a b"])
    config = tiny_config(
        data=config_lib.DataConfig(
            dir=str(root), seq_len=48, max_tiles=2, tasks={"transcribe": 0.5, "answer": 0.5}
        ),
        eval=config_lib.EvalConfig(
            splits=("seen_fonts", "unseen_fonts"), num_questions=6, batch_size=4, max_new_tokens=4
        ),
    )
    llm = dataclasses.replace(
        config.model.llm, vocab_size=tokenizer.vocab_size + 4 - tokenizer.vocab_size % 4
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, llm=llm))
    # Of numpy: orbax would compile a slice for every shard that several devices hold.
    params = random_params(
        vlm.VLM(config.model),
        vlm.abstract_batch(config.model, config.data, config.train.batch_size),
    )
    with checkpoint.Checkpoints(root / checkpoint.FOLDER) as checkpoints:
        checkpoints.save(
            7,
            train_state.TrainState(np.int32(7), params, ()),
            position={"next_sequence": 56},
            metadata=checkpoint.describe((config,), config, train_seconds=12.5, answer_loss=None),
            metrics=None,
        )
    return root


def random_record(rng: np.random.Generator, name: str, source: str) -> record.Record:
    """A page of 16 x 16 random pixels that is said to show one word."""
    page = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    amount = str(rng.integers(100, 1000))
    turns = (record.Turn(EVAL_QUESTION, (amount,)), record.Turn("Who?", ("Ann", "Anna")))
    word = record.Word(amount, (0.0, 0.0, 8.0, 4.0))
    return record.Record(name, source, (images.encode_png(page),), turns, (((word,),),))
