"""Two real processes, joined by jax.distributed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignvlm_jax.data import sources
from alignvlm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer as Tokenizer
from tests.conftest import EVAL_QUESTION, random_record

REPOSITORY = Path(__file__).parents[2]
CONFIG = """
from alignvlm_jax import config as config_lib

def get_config():
    config = config_lib.default_config_dict()
    config.model.vision.update(tile_height=8, tile_width=16, patch_height=4, patch_width=4)
    config.model.vision.update(width=16, mlp_width=32, num_layers=1, num_heads=2)
    config.model.llm.update(width=16, mlp_width=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4)
    config.data.update(row_length=64, max_unsupervised=1.0)
    config.mesh.update(data=2, fsdp=2)
    config.train.update(num_steps=4, batch_size=8, log_every=1, validation_rows=8)
    return config
"""


@pytest.fixture
def flags(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        records = [random_record(rng, f"{split}-{i}", "form") for i in range(8)]
        sources.write_shard(tmp_path / sources.shard_name(split, 0, 1), records)
    Tokenizer.train(tmp_path / "tokenizer.model", [EVAL_QUESTION, "a b", "0123456789"])
    (tmp_path / "config.py").write_text(CONFIG)
    return ["train", f"--config={tmp_path}/config.py", f"--config.data.dir={tmp_path}"]


def run(command: list[str], workdir: Path, **environment: str) -> list[dict]:
    """The lines of metrics.jsonl that such a run writes."""
    done = subprocess.run(
        [*command, f"--workdir={workdir}"],
        capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(flags, tmp_path):
    """Each has two devices and reads half of every batch; one of them writes."""
    launcher = [str(REPOSITORY / "launch" / "local.sh"), "2", "2"]
    two = run([*launcher, *flags], tmp_path / "two", PYTHON=sys.executable, LOGS=str(tmp_path / "logs"))
    one = run(
        [sys.executable, "-m", "alignvlm_jax", *flags],
        tmp_path / "one",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    assert [line["step"] for line in two if "loss" in line] == [1, 2, 3, 4]
    assert len(two) == len(one)
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() & {"loss", "answer_loss", "patch_loss", "grad_norm", "validation/answer_loss"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name
