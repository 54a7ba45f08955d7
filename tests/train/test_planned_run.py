"""A whole run over real, planned rows of two sources."""

import dataclasses
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alignvlm_jax.config import Config, SourceConfig, TrainConfig
from alignvlm_jax.data import index as index_lib
from alignvlm_jax.data import pipeline, sources
from alignvlm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import loop, step
from tests.conftest import EVAL_QUESTION, random_record, tiny_config
from tests.train import fake_run

COUNTERS = (
    "epoch",
    "fill",
    "unsupervised_records",
    *(f"{what}/{name}" for what in ("records", "tokens") for name in "ab"),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("sources")
    tokenizer = SentencePieceTokenizer.train(root / "tokenizer.model", [EVAL_QUESTION, "Who? Ann 0123456789"])
    fingerprint = index_lib.tokenizer_fingerprint(root)
    rng = np.random.default_rng(0)
    for name, count in (("a", 40), ("b", 24)):
        for split in ("train", "validation"):
            records = [random_record(rng, f"{name}{split}-{i}", "form") for i in range(count)]
            path = root / name / sources.shard_name(split, 0, 1)
            path.parent.mkdir(exist_ok=True)
            sources.write_shard(path, records)
            index_lib.write(index_lib.index_path(path), index_lib.of_records(records, tokenizer, fingerprint))
        (root / name / "prepare.json").write_text(name)
    base = tiny_config()
    llm = dataclasses.replace(base.model.llm, vocab_size=tokenizer.vocab_size + 4 - tokenizer.vocab_size % 4)
    mixture = {name: SourceConfig(dir=str(root / name), weight=weight) for name, weight in (("a", 1.0), ("b", 2.0))}
    data = dataclasses.replace(
        base.data, dir=str(root), sources=mixture, packing="plan", row_length=128, max_tiles=6, record_tiles=2
    )
    train = TrainConfig(num_steps=6, batch_size=8, log_every=1, validation_rows=8, checkpoint_every=2)
    return dataclasses.replace(
        base, stage="planned", data=data, train=train, model=dataclasses.replace(base.model, llm=llm)
    )


def train(config: Config, workdir: Path, monkeypatch, stop_at: int | None = None) -> list[dict]:
    """The lines of training that a run, stopped while it fetches the batch of a step, leaves."""
    fetch = pipeline.TrainBatches.__next__

    def fetch_or_stop(batches):
        if stop_at and batches.next_row == 8 * (stop_at - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(batches)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.TrainBatches, "__next__", fetch_or_stop)
        patch.setattr(step, "compile_steps", fake_run._compile_steps)
        try:
            loop.train((config,), workdir, Console(file=io.StringIO()))
        except loop.Stopped:
            assert stop_at
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_stopped_run_counts_and_learns_as_one_that_was_not(config, tmp_path, monkeypatch):
    straight = train(config, tmp_path / "straight", monkeypatch)
    assert [line["step"] for line in straight] == [1, 2, 3, 4, 5, 6]
    stopped = train(config, tmp_path / "stopped", monkeypatch, stop_at=3)
    assert [line["step"] for line in stopped] == [1, 2, 3]
    resumed = train(config, tmp_path / "stopped", monkeypatch)
    for ours, theirs in zip(resumed, straight, strict=True):
        for name in (*COUNTERS, "loss", "grad_norm"):
            assert ours[name] == theirs[name], name
    schedule = pipeline.TrainRows(config, "train").schedule
    picks = [pick for row in range(48) for pick in schedule.picks(row)]
    last = straight[-1]
    assert (last["records/a"], last["records/b"]) == (
        sum(p.record < 40 for p in picks),
        sum(p.record >= 40 for p in picks),
    )
    assert last["epoch"] > 1 and 0.7 < last["fill"] <= 1 and last["unsupervised_records"] == 0
    assert last["fill"] == pytest.approx((last["tokens/a"] + last["tokens/b"]) / (48 * 128))


def test_other_data_in_any_source_are_refused(config, tmp_path, monkeypatch):
    train(config, tmp_path, monkeypatch, stop_at=1)
    path = Path(config.data.sources["b"].dir, "prepare.json")
    path.write_text("other")
    with pytest.raises(UserError, match=r"was trained on data of fingerprint \w{8}, that of \S+/a, \S+/b is"):
        train(config, tmp_path, monkeypatch)
    path.write_text("b")
