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
from configs import demo

def get_config():
    config = demo.get_config()
    # Loops compile in half of the time.
    config.model.scan_unroll = 1
    config.mesh.update(data=2, fsdp=4)
    config.data.max_unsupervised = 1.0
    config.train.update(log_every=1, validation_rows=16)
    config.stages = {"stage2": config.stages.stage2.to_dict()}
    config.stages.stage2.train.num_steps = 4
    return config
"""


@pytest.fixture
def flags(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        records = [random_record(rng, f"{split}-{i}", "form") for i in range(16)]
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
    """The demonstration's stage 2. Each has four devices and reads half of every batch; one of them writes."""
    launcher = [str(REPOSITORY / "launch" / "local.sh"), "2", "4"]
    two = run([*launcher, *flags], tmp_path / "two", PYTHON=sys.executable, LOGS=str(tmp_path / "logs"))
    one = run(
        [sys.executable, "-m", "alignvlm_jax", *flags],
        tmp_path / "one",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert [line["step"] for line in two if "loss" in line] == [1, 2, 3, 4]
    assert len(two) == len(one)
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() & {"loss", "answer_loss", "patch_loss", "grad_norm", "validation/answer_loss"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name
