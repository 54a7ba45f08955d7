"""A whole run over real, packed sequences of two sources."""

import dataclasses
import gc
import io
import json
import math
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alignvlm_jax.benchmarks import generation_eval, scores
from alignvlm_jax.benchmarks.questions import choose_questions
from alignvlm_jax.commands.work.train import EVALUATORS
from alignvlm_jax.config import Config, SourceConfig, TrainConfig
from alignvlm_jax.data import images, loader, shards, stage_data, validation
from alignvlm_jax.data import index as index_lib
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import answering, assistant
from alignvlm_jax.train import loop, preflight, step
from tests.conftest import EVAL_QUESTION, random_record, tiny_config
from tests.train import fake_run

COUNTERS = (
    "epoch",
    "packing_efficiency",
    "tile_efficiency",
    "unsupervised_records",
    *(f"{what}/{name}" for what in ("records", "tokens") for name in "ab"),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("sources")
    tokenizer = SentencePieceTokenizer.train(
        root / "tokenizer.model", [EVAL_QUESTION, "Who? Ann 0123456789"]
    )
    fingerprint = index_lib.tokenizer_fingerprint(root)
    rng = np.random.default_rng(0)
    for name, count in (("a", 40), ("b", 24)):
        for split in ("train", "validation"):
            records = [random_record(rng, f"{name}{split}-{i}", "form") for i in range(count)]
            path = root / name / shards.shard_name(split, 0, 1)
            path.parent.mkdir(exist_ok=True)
            shards.write_shard(path, records)
            index_lib.write(
                index_lib.index_path(path), index_lib.of_records(records, tokenizer, fingerprint)
            )
        (root / name / "prepare.json").write_text(json.dumps({"source": name}))
    base = tiny_config()
    llm = dataclasses.replace(
        base.model.llm, vocab_size=tokenizer.vocab_size + 4 - tokenizer.vocab_size % 4
    )
    mixture = {
        name: SourceConfig(dir=str(root / name), weight=weight)
        for name, weight in (("a", 1.0), ("b", 2.0))
    }
    data = dataclasses.replace(
        base.data,
        dir=str(root),
        sources=mixture,
        packing="offline",
        seq_len=128,
        max_tiles=6,
        record_tiles=2,
    )
    train = TrainConfig(
        num_steps=6,
        batch_size=8,
        log_every=1,
        validation_sequences=16,
        checkpoint_every=2,
        validate_every=3,
        generate_every=3,
        generate_questions=4,
    )
    return dataclasses.replace(
        base,
        stage="planned",
        data=data,
        train=train,
        model=dataclasses.replace(base.model, llm=llm),
    )


def train(config: Config, workdir: Path, monkeypatch, stop_at: int | None = None) -> list[dict]:
    """The lines of training that a run leaves, stopped after a step, while it fetches the batch of
    the next."""
    fetch = loader.TrainBatches.__next__

    def fetch_or_stop(batches):
        if stop_at and batches.next_sequence == 8 * stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(batches)

    with monkeypatch.context() as patch:
        patch.setattr(loader.TrainBatches, "__next__", fetch_or_stop)
        patch.setattr(step, "compile_steps", fake_run._compile_steps)
        try:
            loop.train((config,), workdir, Console(file=io.StringIO()), EVALUATORS)
        except loop.Stopped:
            assert stop_at
    return [line for line in lines(workdir) if "loss" in line]


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_what_is_packed_is_told_and_the_steps_that_hold_the_records_wanted(
    config, capsys, monkeypatch
):
    """Before anything is compiled; typed as it stands, the flag is right."""
    # The words of these pages are small, which would be told as well.
    monkeypatch.setattr(preflight, "LEGIBLE_PIXELS", 0.0)

    def told(**fields) -> str:
        planned = dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))
        preflight.open_stages((planned,))
        return capsys.readouterr().err

    rows = loader.TrainSequences(config, "train").schedule
    counters = rows.counters(rows.epoch_at(0).end)
    each = (counters["records/a"] + counters["records/b"]) / rows.epoch_at(0).end
    line = told()
    assert line.startswith(f"stage 'planned': {each:.2f} records a packed sequence, ")
    assert f"{counters['packing_efficiency']:.1%} of its tokens" in line
    assert f"{counters['tile_efficiency']:.1%} of its tiles used; 6 steps of 8 hold" in line
    assert f"hold {round(48 * each)} records" in line and "--config" not in line
    flag = told(num_records=5000).rpartition("--config.stages.planned.train.num_steps=")[2]
    assert int(flag) == math.ceil(5000 / (8 * each))
    assert "--config" not in told(num_records=5000, num_steps=int(flag))
    unpacked = dataclasses.replace(config.data, packing="none")
    preflight.open_stages((dataclasses.replace(config, data=unpacked),))
    assert capsys.readouterr().err == ""


def test_a_stopped_run_counts_and_learns_as_one_that_was_not(config, tmp_path, monkeypatch):
    straight = train(config, tmp_path / "straight", monkeypatch)
    assert [line["step"] for line in straight] == [1, 2, 3, 4, 5, 6]
    stopped = train(config, tmp_path / "stopped", monkeypatch, stop_at=3)
    assert [line["step"] for line in stopped] == [1, 2, 3]
    resumed = train(config, tmp_path / "stopped", monkeypatch)
    for ours, theirs in zip(resumed, straight, strict=True):
        for name in (*COUNTERS, "loss", "grad_norm"):
            assert ours[name] == theirs[name], name
    schedule = loader.TrainSequences(config, "train").schedule
    picks = [pick for row in range(48) for pick in schedule.picks(row)]
    last = straight[-1]
    assert (last["records/a"], last["records/b"]) == (
        sum(p.record < 40 for p in picks),
        sum(p.record >= 40 for p in picks),
    )
    assert (
        last["epoch"] > 1
        and 0.7 < last["packing_efficiency"] <= 1
        and last["unsupervised_records"] == 0
    )
    assert last["packing_efficiency"] == pytest.approx(
        (last["tokens/a"] + last["tokens/b"]) / (48 * 128)
    )


def test_the_data_of_a_stage_go_with_it_and_stages_share_a_tokenizer(config, tmp_path, monkeypatch):
    opened = []
    alive = []
    read = []
    open_data = StageData.open
    load = stage_data.tokenizers.load
    begin = loader.TrainBatches.__init__

    def remembered(*args):
        found = open_data(*args)
        opened.append(weakref.ref(found))
        return found

    def begun(self, *args, **kwargs):
        gc.collect()
        alive.append([ref() is not None for ref in opened])
        begin(self, *args, **kwargs)

    monkeypatch.setattr(StageData, "open", remembered)
    monkeypatch.setattr(stage_data.tokenizers, "load", lambda path: read.append(path) or load(path))
    monkeypatch.setattr(loader.TrainBatches, "__init__", begun)
    monkeypatch.setattr(step, "compile_steps", fake_run._compile_steps)
    shorter = dataclasses.replace(config.train, num_steps=1)
    stages = tuple(
        dataclasses.replace(config, stage=name, train=shorter) for name in ("first", "second")
    )
    loop.train(stages, tmp_path, Console(file=io.StringIO()), EVALUATORS)
    # All are opened before anything is trained; the first is not kept for the second's sake.
    assert alive == [[True, True], [False, True]]
    assert [str(path) for path in read] == [config.data.dir]


def test_losses_and_generated_scores_by_source(config, tmp_path, monkeypatch):
    """Of generation: one trace a stage, and the scores are those of the checkpoint's own
    answers."""
    traces = []
    insert = answering.insert

    def traced(model, mesh, variables, state, batch, *args, **kwargs):
        traces.append(tuple((name, array.shape) for name, array in sorted(batch.items())))
        return insert(model, mesh, variables, state, batch, *args, **kwargs)

    monkeypatch.setattr(answering, "insert", traced)
    # A model of six steps has no other.
    monkeypatch.setattr(scores, "anls", lambda said, answers: len(said) / 8)
    train(config, tmp_path, monkeypatch)
    assert len(traces) == len(set(traces)) <= 3
    losses = [line for line in lines(tmp_path) if "validation/answer_loss" in line]
    asked = [line for line in lines(tmp_path) if "generated/anls" in line]
    assert [line["step"] for line in losses] == [line["step"] for line in asked] == [3, 6]
    for line in losses:
        of_sources = sorted(line[f"validation/{name}/answer_loss"] for name in "ab")
        assert of_sources[0] < line["validation/answer_loss"] < of_sources[1]
    # As it would elsewhere, after the data were deleted: all that it needs is in the workdir.
    with monkeypatch.context() as away:
        away.setattr(stage_data, "load_tokenizer", None)
        model = assistant.load(tmp_path)
    means = {}
    for name in "ab":
        records = shards.RecordSource(config.data.sources[name].dir, "validation")
        questions = choose_questions(records, 4)
        pages = [
            images.decode_image(records[question.record].images[0], "") for question in questions
        ]
        said = model.answer(pages, [question.turn.question for question in questions])
        assert any(said)
        means[name] = sum(map(len, said)) / 8 / 4
        assert asked[-1][f"generated/{name}/anls"] == pytest.approx(means[name])
    assert asked[-1]["generated/anls"] == pytest.approx((means["a"] + means["b"]) / 2)


def test_stages_without_questions_are_told_before_the_first_step(config, tmp_path, monkeypatch):
    """Of all stages, also of a later one."""
    monkeypatch.setattr(generation_eval.questions, "choose_questions", lambda records, count: [])
    mute = dataclasses.replace(
        config, stage="mute", train=dataclasses.replace(config.train, generate_every=0)
    )
    with pytest.raises(
        UserError, match=r"split 'validation' in .* has no questions .*generate_every=0 asks none"
    ):
        loop.train((mute, config), tmp_path / "run", Console(file=io.StringIO()), EVALUATORS)
    assert not (tmp_path / "run").exists()


def test_answers_beyond_what_the_language_model_knows_are_told_before_the_first_step(
    config, tmp_path
):
    llm = dataclasses.replace(config.model.llm, context_length=64)
    long = dataclasses.replace(
        config,
        stage="long",
        model=dataclasses.replace(config.model, llm=llm),
        eval=dataclasses.replace(config.eval, max_new_tokens=config.data.seq_len + 64),
    )
    mute = dataclasses.replace(config.train, generate_every=0)
    first = dataclasses.replace(long, stage="first", train=mute)
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens .* allow at most \d+ new"):
        loop.train((first, long), tmp_path / "run", Console(file=io.StringIO()), EVALUATORS)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def with_pages_alone(config, tmp_path) -> Config:
    """The config where source "b" has no questions, and pages whose words are not known; the task
    is to answer."""
    for split in ("train", "validation"):
        path = tmp_path / shards.shard_name(split, 0, 1)
        source = shards.RecordSource(config.data.sources["b"].dir, split)
        records = [dataclasses.replace(source[i], turns=(), lines=()) for i in range(len(source))]
        shards.write_shard(path, records)
        tokenizer = stage_data.load_tokenizer(config.data, config.model)
        fingerprint = index_lib.tokenizer_fingerprint(config.data.dir)
        index_lib.write(
            index_lib.index_path(path), index_lib.of_records(records, tokenizer, fingerprint)
        )
    mixture = {"a": config.data.sources["a"], "b": SourceConfig(dir=str(tmp_path))}
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources=mixture, tasks={"answer": 1.0})
    )


def test_a_source_of_no_use_to_the_tasks_is_no_part_of_validation(with_pages_alone):
    assert list(validation.by_source(with_pages_alone)) == ["a"]
    data = dataclasses.replace(
        with_pages_alone.data,
        tasks={"transcribe": 1.0},
        sources={"b": with_pages_alone.data.sources["b"]},
    )
    with pytest.raises(
        UserError, match=r"none of 24 records in .* has text for config.data.tasks transcribe"
    ):
        validation.by_source(dataclasses.replace(with_pages_alone, data=data))


def test_what_was_not_seen_has_no_loss_and_is_not_asked(with_pages_alone, tmp_path, monkeypatch):
    """Without a plan the records of no use take rows: a loss of 0 there would look perfect."""
    data = dataclasses.replace(
        with_pages_alone.data, packing="none", max_tiles=2, max_unsupervised=1.0
    )
    train(dataclasses.replace(with_pages_alone, data=data), tmp_path / "run", monkeypatch)
    names = {name for line in lines(tmp_path / "run") for name in line}
    measured = {name for name in names if name.startswith("validation/")}
    # Of the one source that is left, without its name.
    assert measured >= {"validation/answer_loss", "validation/patch_loss"}
    assert not [name for name in measured if name.count("/") == 2]


def test_other_data_in_any_source_are_refused(config, tmp_path, monkeypatch):
    train(config, tmp_path, monkeypatch, stop_at=1)
    path = Path(config.data.sources["b"].dir, "prepare.json")
    path.write_text('{"source": "other"}')
    with pytest.raises(
        UserError, match=r"was trained on data of fingerprint \w{8}, that of \S+/a, \S+/b is"
    ):
        train(config, tmp_path, monkeypatch)
    path.write_text('{"source": "b"}')
