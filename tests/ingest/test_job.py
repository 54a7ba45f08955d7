import collections
import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from alignvlm_jax.data import chat, chat_format, chat_template, index, shards
from alignvlm_jax.data import tokenizers as our_tokenizers
from alignvlm_jax.data.record import decode_record
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest import finish, grouping, job, staging, summary, writer
from alignvlm_jax.ingest.formats import files
from alignvlm_jax.ingest.formats.base import Unit
from alignvlm_jax.ingest.formats.jsonl import Jsonl
from tests.data import templates

COUNT = 40


def write(folder, objects, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in objects))
    return folder / name


def one(number: int, **changes) -> dict:
    turns = [{"question": f"What is {number}?", "answers": [str(number)]}]
    return {
        "id": f"r{number:03d}",
        "images": [f"{number // 2}.png"],
        "turns": turns,
        "document": f"d{number // 2}",
    } | changes


@pytest.fixture
def source(tmp_path, png, monkeypatch):
    """Forty records, with three that cannot be used, in pieces of about eight."""
    monkeypatch.setattr(files, "UNIT_RECORDS", 8)
    for document in (*range(COUNT // 2 + 1), 50):
        (tmp_path / f"{document}.png").write_bytes(png(shade=document))
    objects = [one(number) for number in range(COUNT)]
    for number in (3, 17, 39):
        objects[number]["images"] = ["none.png"]
    return write(tmp_path, objects)


def ids(prepared, split="train"):
    return [record.id for record in prepared.records(split)]


def test_the_folder(source, prepare, tokenizer):
    prepared = prepare(Jsonl(), source, holdout=0.3)
    expected = [f"r{number:03d}" for number in range(COUNT) if number not in (3, 17, 39)]
    assert sorted(ids(prepared) + ids(prepared, "validation")) == expected
    assert (
        ids(prepared) == sorted(ids(prepared))
        and len(shards.shard_paths(prepared.folder, "train")) > 1
    )
    assert list(prepared.reasons()) == ["r003", "r017", "r039"]
    assert prepared.rejected()[0] == {
        "source": str(source),
        "place": "line 4",
        "images": ["none.png"],
        "id": "r003",
        "reason": "an image is missing (none.png)",
    }
    assert json.loads((prepared.folder / "prepare.json").read_text())["holdout"] == 0.3
    names = {path.name for path in prepared.folder.iterdir() if path.suffix != ".array_record"}
    merged = {
        f"{kind}-{split}.npz" for kind in ("index", "shards") for split in ("train", "validation")
    }
    assert names == merged | {
        *("rejected.jsonl", "counts.json", "prepare.json", "tokenizer.model", "images.jsonl")
    }
    copied = our_tokenizers.load(prepared.folder)
    assert copied.encode("total 1") == tokenizer.encode("total 1")
    text = summary.of(prepared.folder)
    assert "rejected: 3" in text and f"3: an image is missing; first {source}, line 4" in text


def test_the_index_is_of_the_records_of_the_shards(source, prepare, tokenizer):
    prepared = prepare(Jsonl(), source, holdout=0.3)
    for split in writer.SPLITS:
        loaded = index.load(prepared.folder, split)
        made = index.of_records(
            prepared.records(split), tokenizer, index.tokenizer_fingerprint(tokenizer.name)
        )
        assert np.array_equal(loaded.text_tokens["answer"], made.text_tokens["answer"])
        assert (
            np.array_equal(loaded.content_hash, made.content_hash)
            and loaded.tokenizer == made.tokenizer
        )
        assert np.array_equal(loaded.image_starts, made.image_starts)
        assert np.array_equal(loaded.image_sizes, made.image_sizes)


def test_documents_are_held_out_whole(source, prepare):
    prepared = prepare(Jsonl(), source, holdout=0.3)
    documents = [{int(name[1:]) // 2 for name in ids(prepared, split)} for split in writer.SPLITS]
    assert documents[0] and documents[1] and not documents[0] & documents[1]
    assert len(documents[1]) == pytest.approx(0.3 * COUNT / 2, abs=4)
    nothing, everything = (
        prepare(Jsonl(), source, f"all{fraction}", holdout=fraction) for fraction in (0.0, 1.0)
    )
    assert not nothing.records("validation") and not everything.records("train")
    assert len(nothing.records("train")) == len(everything.records("validation")) == COUNT - 3


def test_two_workers_make_the_same_bytes(source, prepare):
    alone, together = (
        prepare(Jsonl(), source, f"w{count}", holdout=0.3, num_workers=count) for count in (1, 2)
    )
    assert alone.files() == together.files()


@pytest.mark.parametrize(
    "place", ["in a part", "between parts", "in a join", "while moving into place"]
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    source, prepare, monkeypatch, place
):
    whole = prepare(Jsonl(), source, "whole", holdout=0.3)
    at = {
        "in a part": (shards.ShardWriter, "write", 20),
        "between parts": (writer, "write_lines", 5),
        "in a join": (finish.ShardWriter, "write", 37 + 30),
        "while moving into place": (os, "replace", None),
    }[place]
    target, name, count = at
    calls = itertools.count(1)
    original = getattr(target, name)

    def stop(*args):
        is_last_move = str(args[-1]).endswith("out/tokenizer.model")
        if (count is None and is_last_move) or next(calls) == count:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(target, name, stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(Jsonl(), source, "out", holdout=0.3)
    monkeypatch.setattr(target, name, original)
    assert not (whole.folder.parent / "out" / "prepare.json").exists()
    assert prepare(Jsonl(), source, "out", holdout=0.3).files() == whole.files()


def test_a_list_of_finished_files_that_was_not_written_whole_is_written_again(
    source, prepare, monkeypatch
):
    whole = prepare(Jsonl(), source, "whole")

    def stop(file):
        if "finished" in os.readlink(f"/proc/self/fd/{file}"):
            os.ftruncate(file, 10)
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop)
        with pytest.raises(OSError, match="No space"):
            prepare(Jsonl(), source)
    assert prepare(Jsonl(), source).files() == whole.files()


def test_a_run_that_is_interrupted_while_it_tidies_up_is_done(source, prepare, monkeypatch):
    whole = prepare(Jsonl(), source, "whole")
    original = shutil.rmtree

    def stop(folder, **options):
        if ".partial-" in Path(folder).name:
            Path(folder, "finished.json").unlink()
            raise KeyboardInterrupt
        original(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(Jsonl(), source)
    prepared = prepare(Jsonl(), source)
    for leftover in prepared.folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    assert prepared.files() == whole.files()


def test_parts_that_are_done_are_not_done_again(source, prepare, monkeypatch):
    monkeypatch.setattr(finish, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(Jsonl(), source)
    monkeypatch.undo()
    monkeypatch.setattr(files, "UNIT_RECORDS", 8)
    monkeypatch.setattr(
        writer.UnitWriter, "__call__", lambda *args: pytest.fail("a part was written again")
    )
    assert len(prepare(Jsonl(), source).records()) == COUNT - 3


def test_a_killed_worker_ends_the_run_with_a_reason(source, tmp_path, tokenizer):
    request = job.Request("test", KillingJsonl(), str(source), tokenizer.name, 0.0)
    with pytest.raises(UserError, match=r"killed by SIGKILL \(out of memory\?.*goes on"):
        job.prepare(request, tmp_path / "out", job.on_processes(2))


class KillingJsonl(Jsonl):
    """Found by its name in a worker."""

    def record(self, raw):
        if raw.id == "r020":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().record(raw)


class FaultyJsonl(Jsonl):
    """With a fault of ours."""

    def record(self, raw):
        return super().record(raw) if raw.id != "r020" else 1 / 0


def test_a_fault_of_ours_is_a_reason_and_ends_nothing(source, prepare):
    prepared = prepare(FaultyJsonl(), source)
    assert len(prepared.records()) == COUNT - 4
    assert prepared.reasons()["r020"] == "unforeseen ZeroDivisionError (division by zero)"


def test_of_equal_ids_the_first_stays(tmp_path, prepare, monkeypatch, source):
    objects = [one(number) for number in range(COUNT)]
    objects[9]["id"] = objects[8]["id"] = "r005"  # in one piece and in others, and of both splits
    objects[30]["id"] = "r029"
    (tmp_path / "many").mkdir()
    for file in (1, 2):
        write(tmp_path / "many", objects if file == 1 else [one(0), one(100)], f"{file}.jsonl")
    for path in tmp_path.glob("*.png"):
        shutil.copy(path, tmp_path / "many")
    prepared = prepare(Jsonl(), tmp_path / "many", holdout=0.3)
    found = sorted(ids(prepared) + ids(prepared, "validation"))
    expected = {f"r{number:03d}" for number in range(COUNT)} - {"r008", "r009", "r030"} | {"r100"}
    assert found == sorted(expected)
    (first,) = [
        record
        for split in writer.SPLITS
        for record in prepared.records(split)
        if record.id == "r005"
    ]
    assert first.turns[0].question == "What is 5?"
    assert [(line["id"], line["source"][-7:]) for line in prepared.rejected()] == [
        ("r005", "1.jsonl"),
        ("r005", "1.jsonl"),
        ("r029", "1.jsonl"),
        ("r000", "2.jsonl"),
    ]
    assert (
        prepared.rejected()[-1]["reason"]
        == f"duplicate id (of one in {tmp_path}/many/1.jsonl, line 1)"
    )
    for split in writer.SPLITS:
        hashes = [index.content_hash(record) for record in prepared.records(split)]
        assert index.load(prepared.folder, split).content_hash.tolist() == hashes


def test_hashes_alone_reject_nobody(source, prepare, monkeypatch):
    monkeypatch.setattr(grouping, "document_hash", lambda name: int(name[1:]) % 3)
    assert len(prepare(Jsonl(), source).records()) == COUNT - 3


def test_a_source_that_changed_is_prepared_anew(source, prepare):
    before = prepare(Jsonl(), source)
    write(source.parent, [one(number) for number in range(5)])
    assert len(prepare(Jsonl(), source).records()) == 5 < len(before.reasons()) + COUNT


def test_a_file_that_has_grown_is_another_source_though_its_pieces_are_the_same(
    source, prepare, monkeypatch
):
    monkeypatch.setattr(Jsonl, "units", lambda *args: [Unit(str(source))])
    read = files.json_objects
    monkeypatch.setattr(
        files, "json_objects", lambda unit: read(dataclasses.replace(unit, stop=1 << 30))
    )
    assert len(prepare(Jsonl(), source).records()) == COUNT - 3
    write(source.parent, [one(number) for number in range(COUNT + 1)])
    assert len(prepare(Jsonl(), source).records()) == COUNT + 1


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_folder_in_the_source_is_no_part_of_it(source, tmp_path_factory, tokenizer, is_linked):
    folder = source.parent
    if is_linked:
        folder = tmp_path_factory.mktemp("other") / "link"
        folder.symlink_to(source.parent)
    request = job.Request("test", Jsonl(), str(folder), tokenizer.name, 0.0)
    run = job.on_processes(1)
    out = source.parent / "a" / ".." / "b"
    assert job.prepare(request, out, run)
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 3
    assert not job.prepare(request, out, run)
    with pytest.raises(UserError, match=r"--out=.* is --source itself"):
        job.prepare(request, source.parent, run)


def test_a_fault_of_ours_in_counting_is_a_reason_as_well(source, prepare, monkeypatch):
    def content_hash(record):
        return 1 / 0 if record.id == "r020" else original(record)

    original = index.content_hash
    monkeypatch.setattr(index, "content_hash", content_hash)
    prepared = prepare(Jsonl(), source)
    assert prepared.reasons()["r020"] == "unforeseen ZeroDivisionError (division by zero)"
    assert len(index.load(prepared.folder, "train")) == len(prepared.records()) == COUNT - 4


def test_what_lay_there_before_goes(source, prepare, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (
        "tokenizer.json",
        "train-00000-of-00009.array_record",
        "train-00000-of-00009.index.npz",
        "mine.txt",
    ):
        (tmp_path / "out" / name).write_text("{}")
    prepared = prepare(Jsonl(), source)
    assert len(prepared.records()) == COUNT - 3
    assert (tmp_path / "out/mine.txt").exists() and not (tmp_path / "out/tokenizer.json").exists()
    assert not (tmp_path / "out/train-00000-of-00009.index.npz").exists()


def test_a_source_without_any_record_is_a_user_error(tmp_path, prepare):
    reason = r"nothing to learn: no answer and no words \(.*, line 1, id data-0; 2 rejected, see .*rejected\.jsonl"
    with pytest.raises(UserError, match=rf"no record that can be used: {reason}"):
        prepare(Jsonl(), write(tmp_path, [{}, {}]))
    with pytest.raises(UserError, match=r"no record that can be used: its files hold none at all$"):
        prepare(Jsonl(), write(tmp_path, []))


@pytest.fixture
def few(tmp_path, png, monkeypatch):
    """Twelve documents, of which none falls into validation, in pieces of about two."""
    monkeypatch.setattr(files, "UNIT_RECORDS", 2)
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(shade=number))
    objects = [one(number, images=[f"{number // 2}.png"], document=None) for number in range(24)]
    return write(tmp_path, [{k: v for k, v in each.items() if v} for each in objects])


def test_of_a_small_source_one_document_is_held_out(few, prepare):
    """It is the one that a larger fraction would hold out first."""
    prepared = prepare(Jsonl(), few)
    assert not prepared.records("validation") and "--holdout is 0" in summary.of(prepared.folder)
    prepared = prepare(Jsonl(), few, holdout=1e-9)
    held = ids(prepared, "validation")
    assert len(held) == 2 and len({int(name[1:]) // 2 for name in held}) == 1
    assert sorted(held + ids(prepared)) == [f"r{number:03d}" for number in range(24)]
    fraction = 0.01
    while not (
        larger := ids(prepare(Jsonl(), few, f"at{fraction}", holdout=fraction), "validation")
    ):
        fraction += 0.01
    assert set(held) <= set(larger)
    for split in writer.SPLITS:
        hashes = [index.content_hash(record) for record in prepared.records(split)]
        assert index.load(prepared.folder, split).content_hash.tolist() == hashes


def test_of_a_small_source_one_document_is_trained_on(few, prepare):
    prepared = prepare(Jsonl(), few, holdout=1 - 1e-9)
    assert len(ids(prepared)) == 2 and len(ids(prepared, "validation")) == 22


def test_who_is_held_out_of_a_small_source_depends_on_no_order(few, prepare, tokenizer, tmp_path):
    alone = prepare(Jsonl(), few, "alone", holdout=1e-9)
    assert prepare(Jsonl(), few, "two", holdout=1e-9, num_workers=2).files() == alone.files()

    def backwards_and_twice(write, tasks):
        """As a scheduler may that tries again, on workers of any order."""
        for task in [*reversed(tasks), *tasks]:
            collections.deque(write(task), maxlen=0)

    request = job.Request("test", Jsonl(), str(few), tokenizer.name, 1e-9, shard_records=10)
    assert job.prepare(request, tmp_path / "other", backwards_and_twice)
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert other == alone.files()
    few.write_text("".join(reversed(few.read_text().splitlines(True))))
    assert {*ids(prepare(Jsonl(), few, "turned", holdout=1e-9), "validation")} == {
        *ids(alone, "validation")
    }


@pytest.mark.parametrize("count", range(1, 30, 3))
def test_an_interrupted_move_of_the_document_goes_on(few, prepare, monkeypatch, count):
    whole = prepare(Jsonl(), few, "whole", holdout=1e-9)
    calls = itertools.count(1)
    original = finish.ShardWriter.write

    def stop(*args):
        if next(calls) == 24 + count:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finish.ShardWriter, "write", stop)
        try:
            prepare(Jsonl(), few, holdout=1e-9)
        except KeyboardInterrupt:
            pass
        else:
            assert count > 24
    assert prepare(Jsonl(), few, holdout=1e-9).files() == whole.files()


def test_one_document_is_not_held_out_and_the_summary_says_what_to_do(tmp_path, prepare, png):
    (tmp_path / "0.png").write_bytes(png())
    prepared = prepare(Jsonl(), write(tmp_path, [one(0, document="d")] * 2), holdout=0.5)
    text = summary.of(prepared.folder)
    assert "train: 1 record," in text
    assert "validation: none, no document could be held out (one document?)" in text
    assert "--config.data.validation_split=train" in text


@pytest.mark.parametrize("holdout", [0.3, 1e-9])
def test_what_is_held_out_is_not_trained_on_under_another_name(tmp_path, prepare, png, holdout):
    """However a path is spelt, and where a copy of a page is another document; also of the one
    document that is held out of a small source."""
    objects = []
    for number in range(20):
        for name in (f"{number}.png", f"copy of {number}.png"):
            (tmp_path / name).write_bytes(png(shade=number))
        for name in (f"{number}.png", f"./{number}.png", f"../{tmp_path.name}/{number}.png"):
            objects.append(one(len(objects), images=[name], document=None))
        objects.append(one(len(objects), images=[str(tmp_path / f"{number}.png")], document=None))
        objects.append(one(len(objects), images=[f"copy of {number}.png"], document=None))
    prepared = prepare(Jsonl(), write(tmp_path, objects), holdout=holdout)
    seen = {split: [record.images for record in prepared.records(split)] for split in writer.SPLITS}
    assert seen["validation"] and not {*seen["train"]} & {*seen["validation"]}
    reasons = [line["reason"] for line in prepared.rejected()]
    assert {*reasons} <= {"its image is one of validation"}
    assert len(seen["train"]) + len(seen["validation"]) + len(reasons) == len(objects)
    # Spellings alone cost nothing: they are one document.
    assert len(reasons) <= 4 * len({*seen["validation"]})


def test_a_folder_with_other_files_is_not_written_to(source, prepare, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "notes.txt", "tokenizer.json", "weights.npz"):
        (tmp_path / "model" / name).touch()
    with pytest.raises(UserError, match=r"holds other files \(config\.json, notes\.txt, token"):
        prepare(Jsonl(), source, out="model")
    with pytest.raises(UserError, match=r"data\.jsonl is a file"):
        prepare(Jsonl(), source, out="data.jsonl")
    # One that is ours may hold notes.
    folder = prepare(Jsonl(), source, out="out").folder
    (folder / "notes.txt").touch()
    (folder / "prepare.json").unlink()
    assert prepare(Jsonl(), source, out="out").records()


def test_questions_without_an_answer_are_told_though_their_record_stays(source, prepare):
    objects = [one(number) for number in range(6)]
    for answers in ([""], [], None):
        objects[4]["turns"].append({"question": "And?", "answers": answers})
    prepared = prepare(Jsonl(), write(source.parent, objects))
    assert [len(record.turns) for record in prepared.records()] == [1] * 6
    assert [(line["id"], line["reason"]) for line in prepared.rejected()] == 3 * [
        ("r004", "a question without an answer, in a record whose others stay")
    ]


def test_files_of_one_name_in_two_folders_keep_all_their_records(tmp_path, prepare, png):
    """Their records and their documents are told apart; what lies flat keeps its names."""
    for shade, folder in enumerate(("in", "in/a", "in/b ü")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png(shade=shade))
        record = {"images": ["1.png"], "turns": [{"question": folder, "answers": ["a"]}]}
        write(tmp_path / folder, [record], "d.v1.jsonl")
        record["turns"][0]["answers"] = ["b"]
        write(tmp_path / folder, [record], "d.v2.jsonl")
    prepared = prepare(Jsonl(), tmp_path / "in", holdout=1e-9)
    assert not prepared.rejected()
    found = sorted(ids(prepared) + ids(prepared, "validation"))
    expected = ["a/d-0", "a/d.v2.jsonl-0", "b ü/d-0", "b ü/d.v2.jsonl-0", "d-0", "d.v2.jsonl-0"]
    assert found == expected
    assert len(ids(prepared, "validation")) == 2


def test_a_tokenizer_without_a_chat_format_is_refused_before_anything_is_read(source, tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    model.save(str(tmp_path / "tokenizer.json"))
    request = job.Request("test", Jsonl(), str(source), str(tmp_path / "tokenizer.json"), 0.0)
    with pytest.raises(UserError, match="no chat format"):
        job.prepare(request, tmp_path / "out", lambda *args: pytest.fail("read"))
    assert not (tmp_path / "out").exists()


def test_the_chat_format_of_a_template_lies_beside_the_data(source, tmp_path):
    folder = tmp_path / "published"
    templates.write(folder, templates.FAMILIES["qwen3"])
    request = job.Request("test", Jsonl(), str(source), str(folder), 0.0)
    out = tmp_path / "out"
    assert job.prepare(request, out, job.on_processes(1))
    assert not job.prepare(request, out, job.on_processes(1))
    published = our_tokenizers.load(folder)
    assert chat_template.format_of(our_tokenizers.load(out)) == chat_template.format_of(published)
    fingerprint = index.tokenizer_fingerprint(folder)
    assert index.load(out, "train").tokenizer == index.tokenizer_fingerprint(out) == fingerprint
    record = next(iter(shards.read_shard(shards.shard_paths(out, "train")[0])))
    turn = decode_record(record).turns[0]
    tokens, _ = chat.encode_chat(published, [(turn.question, turn.answers[0])], 0, 0)
    assert index.load(out, "train").text_tokens["answer"][0] == len(tokens)
    # Prepared again with a tokenizer that has no template, none of it is left.
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_format.json").write_text(chat_format.to_json(chat_format.FAMILIES["smollm"]))
    assert job.prepare(request, out, job.on_processes(1), overwrite=True)
    assert not (out / "chat_format.json").exists()


def test_a_full_disk_is_a_user_error_and_what_was_finished_goes_on(source, prepare, png, tmp_path):
    """A limit on the size of files stands for the disk."""
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes() + np.random.default_rng(0).bytes(100_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises((UserError, OSError)) as error:
            prepare(Jsonl(), source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot write" in str(error.value) or error.value.errno
    assert len(prepare(Jsonl(), source).records()) == COUNT - 3


def test_recount_writes_indexes_and_nothing_else(source, prepare, tmp_path):
    prepared = prepare(Jsonl(), source, holdout=0.3)
    before = prepared.files()
    other = SentencePieceTokenizer.train(tmp_path / "other.model", ["other é texts"])
    counts = job.recount(prepared.folder, str(tmp_path / "other.model"))
    assert sum(counts.values()) == COUNT - 3 and counts["train"] == len(prepared.records())
    changed = {name for name, content in prepared.files().items() if content != before[name]}
    assert (
        changed == {"index-train.npz", "index-validation.npz"}
        and prepared.files().keys() == before.keys()
    )
    assert index.load(prepared.folder, "train").tokenizer == index.tokenizer_fingerprint(
        tmp_path / "other.model"
    )
    made = index.of_records(prepared.records(), other, "")
    assert np.array_equal(
        index.load(prepared.folder, "train").text_tokens["answer"], made.text_tokens["answer"]
    )
    with pytest.raises(UserError, match="run `prepare` first"):
        job.recount(tmp_path / "nowhere", str(tmp_path / "other.model"))


def test_recount_merges_the_indexes_of_a_folder_from_before(
    source, prepare, tokenizer, tmp_path, monkeypatch
):
    """It counts nothing anew, and where it is interrupted what there was can be read."""
    prepared = prepare(Jsonl(), source, holdout=0.3)
    before = prepared.files()
    for split in ("train", "validation"):
        whole = index.load(prepared.folder, split)
        start = 0
        for path in shards.shard_paths(prepared.folder, split):
            count = len(list(shards.read_shard(path)))
            index.write(
                index.index_path(path), index.select(whole, np.arange(start, start + count))
            )
            start += count
        (prepared.folder / f"index-{split}.npz").unlink()
        (prepared.folder / f"shards-{split}.npz").unlink()
    apart = prepared.files()
    assert len(index.load(prepared.folder, "train")) == len(prepared.records())
    with monkeypatch.context() as patch:
        patch.setattr(index, "of_records", lambda *_: pytest.fail("counted anew"))
        patch.setattr(shards, "write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.recount(prepared.folder, tokenizer.name)
        assert prepared.files() == apart
    monkeypatch.setattr(index, "of_records", lambda *_: pytest.fail("counted anew"))
    job.recount(prepared.folder, tokenizer.name)
    assert prepared.files() == before
    assert job.recount(prepared.folder, tokenizer.name)["train"] == len(prepared.records())
    assert prepared.files() == before
