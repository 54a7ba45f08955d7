"""Two real processes, joined by jax.distributed."""

import json
import os
import shutil
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
    config.train.update(log_every=1, validation_rows=16, generate_questions=8)
    config.eval.update(num_questions=12, batch_size=8, max_new_tokens=6)
    config.stages = {"stage2": config.stages.stage2.to_dict()}
    config.stages.stage2.train.update(num_steps=4, generate_every=4)
    return config
"""

NUMBERS = {"loss", "answer_loss", "patch_loss", "grad_norm", "validation/answer_loss", "generated/anls"}


@pytest.fixture
def flags(tmp_path) -> list[str]:
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        records = [random_record(rng, f"{split}-{i}", "form") for i in range(16)]
        sources.write_shard(tmp_path / sources.shard_name(split, 0, 1), records)
    Tokenizer.train(tmp_path / "tokenizer.model", [EVAL_QUESTION, "a b", "0123456789"])
    (tmp_path / "config.py").write_text(CONFIG)
    return ["train", f"--config={tmp_path}/config.py", f"--config.data.dir={tmp_path}"]


def run(arguments: list[str], num_processes: int, logs: Path) -> None:
    """Runs the program on eight devices."""
    environment = {"PYTHON": sys.executable, "LOGS": str(logs)}
    command = [str(REPOSITORY / "launch" / "local.sh"), str(num_processes), str(8 // num_processes)]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_train_and_evaluate_as_one(flags, tmp_path):
    """The demonstration's stage 2. Each has four devices and reads half of every batch; one of them writes."""
    for count, name in ((2, "two"), (1, "one")):
        run([*flags, f"--workdir={tmp_path / name}"], count, tmp_path / "logs")
    two, one = (lines(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [line["step"] for line in two if "loss" in line] == [1, 2, 3, 4]
    assert len(two) == len(one)
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() & NUMBERS:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name
    assert any("generated/anls" in line for line in one)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    evaluate = ["evaluate", "--splits=validation"]
    for count, name in ((2, "one"), (1, "other")):
        run([*evaluate, f"--checkpoint={tmp_path / name}"], count, tmp_path / "logs")
    for file in ("validation.jsonl", "validation_blind.jsonl"):
        ours, theirs = (lines(tmp_path / name / "predictions" / file)[1:] for name in ("one", "other"))
        assert ours == theirs and len(ours) == 12 and any(row["prediction"] for row in ours)
    # Of a second call the main process tells the other that all is answered.
    before = (tmp_path / "one" / "predictions" / "validation.jsonl").stat().st_mtime_ns
    run([*evaluate, f"--checkpoint={tmp_path / 'one'}"], 2, tmp_path / "logs")
    assert (tmp_path / "one" / "predictions" / "validation.jsonl").stat().st_mtime_ns == before
