"""Folders that several jobs write, a split each: none writes over what other flags made."""

import dataclasses
import json
import os
import shutil

import pytest

from alignvlm_jax.data import index, shards
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import job, staging
from alignvlm_jax.ingest.formats.jsonl import Jsonl
from alignvlm_jax.synthetic import drawn, reader


def write(path, *names):
    turns = [{"question": "Which?", "answers": ["This."]}]
    lines = [{"id": name, "turns": turns, "document": name} for name in names]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(tmp_path, tokenizer):
    """A function that prepares `source` to the folder `out`, as the command does; the source has
    six documents for training, `other` two others, and `out` holds the first."""
    write(tmp_path / "source.jsonl", *"abcdef")
    write(tmp_path / "other.jsonl", *"uv")

    def run(source="source", overwrite=False, **changes):
        path = str(tmp_path / f"{source}.jsonl")
        request = job.Request("jsonl", Jsonl(), path, tokenizer.name, 0.3)
        request = dataclasses.replace(request, **changes)
        return job.prepare(request, tmp_path / "out", job.on_processes(1), overwrite)

    assert run()
    return run


@pytest.fixture
def other_tokenizer(tmp_path):
    path = tmp_path / "other.model"
    SentencePieceTokenizer.train(path, ["What is another tokenizer?"])
    return str(path)


def held(out):
    """The ids of a folder by split, and the names and bytes of all its files."""
    names = shards.split_names(path.name for path in out.iterdir())
    ids = {split: [one.id for one in shards.RecordSource(out, split)] for split in names}
    return ids, {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def refused(run, out, match, **changes):
    before = held(out)
    with pytest.raises(UserError, match=match) as stopped:
        run(**changes)
    assert "\n" not in str(stopped.value) and "--overwrite" in str(stopped.value)
    assert held(out) == before


def test_a_split_of_the_folder_is_not_written_over_by_its_name(run, tmp_path):
    """As a --split, it has other flags than the job that wrote it among others."""
    out = tmp_path / "out"
    sizes = {split: len(ids) for split, ids in held(out)[0].items()}
    assert sum(sizes.values()) == 6
    for split, size in sizes.items():
        match = rf"other\.jsonl --split={split}: it would write all anew"
        match = rf"prepared with --source=.*source\.jsonl no --split \({split} {size} .*{match}"
        refused(run, out, match, source="other", split=split)
        refused(run, out, f"no --split .* --split={split}: it", split=split)
    assert run("other", split="train", overwrite=True)
    assert held(out)[0]["train"] == ["u", "v"]
    # By now the two splits are of two jobs.
    refused(run, out, r"other\.jsonl --split=train \(train 2 records\)")


def test_other_flags_are_refused_after_a_job_of_another_split(run, tmp_path):
    out = tmp_path / "out"
    assert run("other", split="unseen")
    refused(run, out, r"--holdout=0\.3 \(train \d, validation \d records\)", holdout=0.6)
    for number in (3, 4):
        refused(run, out, r"--shard_records=1000 \(unseen 2 r", split="unseen", shard_records=9)
        # The jobs themselves go on, again and with a source that has grown.
        write(tmp_path / "source.jsonl", *"abcdef", *map(str, range(number)))
        assert run()
        assert sum(map(len, held(out)[0].values())) == 6 + 2 + number
        assert run("other", split="unseen")
        assert not run("other", split="unseen")


def test_a_job_of_one_split_leaves_the_others_their_tokenizer(run, tmp_path, other_tokenizer):
    out = tmp_path / "out"
    fingerprints = [index.tokenizer_fingerprint(one)[:8] for one in (out, other_tokenizer)]
    before, now = fingerprints
    match = rf"train \d, validation \d records .*{before}, .*{now}; take that of {out}, "
    refused(run, out, match, source="other", split="extra", tokenizer=other_tokenizer)
    # That of the folder is the same, wherever it lies.
    assert run("other", split="extra", tokenizer=str(out))
    assert run("other", split="extra", tokenizer=other_tokenizer, overwrite=True)
    assert index.tokenizer_fingerprint(out).startswith(now)


def test_a_folder_of_before_tells_the_flags_of_its_last_job(run, tmp_path):
    out = tmp_path / "out"
    alone = json.loads((out / "prepare.json").read_text())
    assert "others" not in alone
    refused(run, out, "prepared with --holdout=0.3", holdout=0.6)
    assert run("other", split="unseen")
    description = json.loads((out / "prepare.json").read_text())
    assert description.pop("others") == dict.fromkeys(("train", "validation"), alone)
    (out / "prepare.json").write_text(json.dumps(description))
    assert not run("other", split="unseen")
    refused(run, out, r"holds train \d, validation \d records of a job whose flags are not kept")
    assert run("other", split="more")
    assert run(overwrite=True) and not run()
    refused(run, out, "prepared with --holdout=0.3", holdout=0.6)
    refused(run, out, r"--shard_records=1000 \(unseen 2 r", split="unseen", shard_records=9)


@pytest.mark.parametrize("at", range(1, 6))
def test_an_interrupted_move_keeps_the_flags_of_all_splits(run, tmp_path, monkeypatch, at):
    out = tmp_path / "out"
    original = os.replace
    moved = []

    def stop(source, target):
        if str(target).startswith(f"{out}/") and ".partial-" not in str(target):
            moved.append(target)
            if len(moved) == at:
                raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run("other", split="unseen")
    assert not (out / "prepare.json").exists()
    refused(run, out, r"--holdout=0\.3 \(train \d, validation \d records\)", holdout=0.6)
    assert run("other", split="unseen")
    assert {*held(out)[0]} == {"train", "validation", "unseen"}
    assert staging.MAKERS not in held(out)[1]
    refused(run, out, r"--holdout=0\.3 \(train \d, validation \d records\)", holdout=0.6)


@pytest.mark.parametrize("flag", ["source", "unseen"])
@pytest.mark.parametrize("is_linked", [False, True])
def test_crops_are_not_written_over_their_pages(manuals, tmp_path, flag, is_linked):
    folders = {name: shutil.copytree(folder, tmp_path / name) for name, folder in manuals.items()}
    arguments = {name: str(folder) for name, folder in folders.items()}
    data = reader.data_set(arguments | {"num_train": 1, "num_eval": 1, "seed": 0})
    out = folders[flag]
    if is_linked:
        (tmp_path / "link").symlink_to(out)
        out = tmp_path / "link"
    before = held(out)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"^--out={out} is --{flag} itself"):
            drawn.prepare(out, data, 1, overwrite)
    assert held(out) == before


def test_what_is_drawn_leaves_other_splits_their_tokenizer(run, manuals, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("other", split="unseen")
    folders = {name: str(folder) for name, folder in manuals.items()}
    monkeypatch.setattr(reader, "SPLITS", {"crops": reader.SPLITS["crops"]})
    data = reader.data_set(folders | {"num_train": 1, "num_eval": 1, "seed": 0})
    before = (out / "tokenizer.model").read_bytes()
    assert drawn.prepare(out, data, 1) and not drawn.prepare(out, data, 1)
    assert {*held(out)[0]} == {"train", "validation", "unseen", "crops"}
    assert (out / "tokenizer.model").read_bytes() == before
    refused(run, out, "--holdout=0.3", holdout=0.6)
    # The demonstration's documents have one of their own.
    (tmp_path / "other").mkdir()
    SentencePieceTokenizer.train(tmp_path / "other" / "tokenizer.model", ["What is another?"])
    own = (tmp_path / "other" / "tokenizer.model").read_bytes()
    with_one = dataclasses.replace(
        data,
        description=data.description | {"seed": 0},
        finish=lambda folder: (folder / "tokenizer.model").write_bytes(own),
    )
    (out / "prepare.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds train \d, .* would put another in its place"):
        drawn.prepare(out, with_one, 1)
