"""A small prepared data set, rendered once for all tests of a process."""

import dataclasses
from pathlib import Path

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.data import documents, sources, tables
from alignvlm_jax.data import index as index_lib
from alignvlm_jax.data.contents import Table
from alignvlm_jax.data.schema import Record
from alignvlm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer as Tokenizer

NUM_DOCUMENTS = 48


@pytest.fixture(scope="session")
def all_tables() -> tuple[Table, ...]:
    return tables.load()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Tokenizer.train(path, ["Total: 123.45", "What is the total?"])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory, all_tables) -> Path:
    """Two shards of training documents, one of every other split, their indexes, and a tokenizer."""
    path = tmp_path_factory.mktemp("data")
    tokenizer = Tokenizer.train(path / "tokenizer.model", ["Total: 123.45", "What is the total?"])
    for split in documents.SPLITS:
        count = 2 if split == "train" else 1
        for shard in range(count):
            indices = range(shard * NUM_DOCUMENTS // count, (shard + 1) * NUM_DOCUMENTS // count)
            records = [documents.render(0, split, index, all_tables) for index in indices]
            write_shard(path / sources.shard_name(split, shard, count), records, tokenizer)
    return path


def write_shard(path: Path, records: list[Record], tokenizer: Tokenizer) -> None:
    """A shard and its index."""
    sources.write_shard(path, records)
    fingerprint = index_lib.tokenizer_fingerprint(tokenizer.name)
    index_lib.write(index_lib.index_path(path), index_lib.of_records(records, tokenizer, fingerprint))


@pytest.fixture
def demo_config(data_dir) -> config_lib.Config:
    """The tiny demonstration's config over `data_dir`."""
    return config_lib.Config(
        data=config_lib.DataConfig(dir=str(data_dir), row_length=144),
        train=dataclasses.replace(config_lib.TrainConfig(), num_steps=20, batch_size=8),
    )
