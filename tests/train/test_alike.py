"""Hosts whose own disks hold other files than the main one's, under the same names."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from alignvlm_jax.data import index, shards, tokenizers
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.conftest import random_record
from tests.parallel import joined
from tests.pod import workload

TRAIN = """
os.chdir(f"{os.environ['HOSTS']}/host{index}")
from alignvlm_jax import __main__ as program
flags = ["--config=config.py", "--workdir=../run", "--config.mesh.data=2", "--config.data.tokenizer=words"]
flags += ["--config.data.packing=none"]
program.leave_with(program.main(["train", *flags]))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Path:
    """A folder with data, a tokenizer, a checkpoint to start from, and a config that names them
    from inside it."""
    folder = tmp_path_factory.mktemp("host")
    workload.write(folder)
    workload.write_config(folder / "config.py", ".")
    (folder / "words").mkdir()
    shutil.copy(folder / "tokenizer.model", folder / "words")
    return folder


def other_start(folder: Path) -> None:
    """The same config and step; only the id of the run tells it from the other."""
    shutil.rmtree(folder / workload.START)
    workload.write_start(folder / "config.py", folder / workload.START)


def other_tokenizer(folder: Path) -> None:
    path = folder / "words" / "tokenizer.model"
    SentencePieceTokenizer.train(path, ["Who? Ann a b", "zyxwvu", "0123456789"])


def other_shard(folder: Path) -> None:
    """As many records, in as many bytes."""
    rng = np.random.default_rng(7)
    records = [random_record(rng, f"form-train-{i}", "form") for i in range(150)]
    shard = folder / shards.shard_name("train", 0, 1)
    size = shard.stat().st_size
    shards.write_shard(shard, records)
    assert shard.stat().st_size == size
    tokenizer = tokenizers.load(folder / "tokenizer.model")
    index.write(
        index.index_path(shard),
        index.of_records(records, tokenizer, index.tokenizer_fingerprint(folder)),
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            other_start,
            "the processes differ in checkpoint 1 of start: checkpoint 1 of start is 'run ",
        ),
        (other_tokenizer, "the processes differ in the tokenizer of stage"),
        (other_shard, "the processes differ in the data of stage"),
    ],
)
def test_what_differs_on_one_host_is_told_before_anything_is_trained(tmp_path, host, change, told):
    for number in range(2):
        shutil.copytree(host, tmp_path / f"host{number}", symlinks=True)
    change(tmp_path / "host1")
    done = joined.run(TRAIN, 2, tmp_path, HOSTS=str(tmp_path))
    assert [one.returncode for one in done] == [1, 1], done
    assert told in done[0].stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
