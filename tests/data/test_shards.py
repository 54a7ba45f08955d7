import os
import resource
import shutil
import zlib

import grain
import numpy as np
import pytest
from array_record.python import array_record_module

from alignvlm_jax.data import arrays, prepared
from alignvlm_jax.data import shards as shards_lib
from alignvlm_jax.data.record import Record
from alignvlm_jax.errors import UserError


def record(name: str) -> Record:
    return Record(name, "test", (b"image " + name.encode(),), ())


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        records = (record(f"{shard}-{i}") for i in range(shard + 1))
        shards_lib.write_shard(tmp_path / shards_lib.shard_name("train", shard, 3), records)
    return tmp_path


def test_records_are_read_at_random_across_shards(shards):
    source = shards_lib.RecordSource(shards, "train")
    assert len(source) == 6
    assert [source[i].id for i in (5, 0, 3, 2)] == ["2-2", "0-0", "2-0", "1-1"]
    assert source[1].images == (b"image 1-0",)


def test_a_failed_write_leaves_no_shard(tmp_path):
    def broken():
        yield record("a")
        raise ValueError("the source broke")

    path = tmp_path / shards_lib.shard_name("train", 0, 1)
    with pytest.raises(ValueError, match="broke"):
        shards_lib.write_shard(path, broken())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        shards_lib.write_shard(tmp_path / "nowhere" / "a.array_record", [record("a")])


def test_missing_splits_and_shards_are_user_errors(shards, tmp_path_factory):
    with pytest.raises(UserError, match="did you mean 'train'"):
        shards_lib.RecordSource(shards, "trian")
    (shards / shards_lib.shard_name("train", 1, 3)).unlink()
    with pytest.raises(UserError, match="2 of 3 shards"):
        shards_lib.RecordSource(shards, "train")
    with pytest.raises(UserError, match="run `prepare` first"):
        shards_lib.RecordSource(tmp_path_factory.mktemp("empty"), "train")


def test_fingerprint_tells_data_apart(tmp_path):
    seen = {prepared.fingerprint(tmp_path)}
    for name, text in (
        ("tokenizer.model", "a"),
        ("prepare.json", "{}"),
        ("prepare.json", '{"seed": 1}'),
    ):
        (tmp_path / name).write_text(text)
        seen.add(prepared.fingerprint(tmp_path))
    assert len(seen) == 4
    assert prepared.fingerprint(tmp_path, tmp_path) not in seen
    (tmp_path / "train-00000-of-00001.array_record").write_text("")
    assert prepared.fingerprint(tmp_path) in seen


def test_contents_tell_copies_apart(shards, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("copies")
    first, second = (shutil.copytree(shards, tmp_path / name) for name in "ab")
    assert prepared.contents(first) == prepared.contents(second) != prepared.contents(first, second)
    shard = next(second.glob("train-*.array_record"))
    for change in (
        # one more
        lambda: shard.with_name("validation-00000-of-00001.array_record").write_bytes(b"x"),
        lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        shard.unlink,
        lambda: (second / "prepare.json").write_text("{}"),
    ):
        before = prepared.contents(second)
        change()
        assert prepared.contents(second) not in (before, prepared.contents(first))
    assert prepared.contents(tmp_path / "none").startswith("0 files of 0 bytes")


def test_contents_tell_records_apart_whose_shards_are_of_one_size(shards, tmp_path_factory):
    other = shutil.copytree(shards, tmp_path_factory.mktemp("other") / "copy")
    for folder, hashes in ((shards, [1, 2]), (other, [1, 3])):
        arrays.write(
            folder / "index-train.npz",
            {"content_hash": np.array(hashes, np.uint64), "rest": np.zeros(99999)},
        )
    assert (shards / "index-train.npz").stat().st_size == (other / "index-train.npz").stat().st_size
    assert prepared.contents(shards) != prepared.contents(other)
    shutil.copy(shards / "index-train.npz", other)
    assert prepared.contents(shards) == prepared.contents(other)
    (other / "index-train.npz").write_bytes(b"damaged")
    assert prepared.contents(shards) != prepared.contents(other)


def test_a_damaged_shard_is_a_user_error(shards):
    path = shards / shards_lib.shard_name("train", 1, 3)
    whole = path.read_bytes()
    at = whole.index(b"image 1-1")
    path.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    source = shards_lib.RecordSource(shards, "train")
    assert source[1].id == "1-0"
    with pytest.raises(
        UserError, match=f"cannot read record 2 of split 'train' in {shards} .*prepare"
    ) as error:
        source[2]
    assert "\n" not in str(error.value)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"cannot read split 'train' in {shards} .*prepare"):
        shards_lib.RecordSource(shards, "train")


def test_a_record_of_another_project_is_a_user_error(shards, monkeypatch):
    monkeypatch.setattr(shards_lib, "encode_record", lambda _: b"other")
    shards_lib.write_shard(shards / shards_lib.shard_name("other", 0, 1), [record("a")])
    with pytest.raises(UserError, match=r"cannot read record 0 of split 'other'.*not a record"):
        shards_lib.RecordSource(shards, "other")[0]


def test_more_shards_than_files_that_may_be_open(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for shard in range(80):
        shards_lib.write_shard(
            tmp_path / shards_lib.shard_name("train", shard, 80), [record(str(shard))]
        )
    try:
        # of what other tests of this process have open
        highest = max(map(int, os.listdir("/dev/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, limits[1]))
        source = shards_lib.RecordSource(tmp_path, "train")
        assert [source[i].id for i in range(80)] == [str(i) for i in range(80)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_shards_than_files_that_may_ever_be_open_is_a_user_error(shards, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    with pytest.raises(
        UserError, match="3 shards, and a process may open 100 files; `ulimit -Hn 515`"
    ):
        shards_lib.RecordSource(shards, "train")


def test_the_fingerprint_knows_a_tokenizer_json_and_takes_the_one_from_before(tmp_path):
    (tmp_path / "prepare.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text("a")
    before = prepared.fingerprint(tmp_path)
    assert before == f"{zlib.crc32(b'{}a'):08x}"  # as it always was
    (tmp_path / "tokenizer.json").write_text("{}")
    now = prepared.fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{} ")
    other = prepared.fingerprint(tmp_path)
    assert len({before, now, other}) == 3
    assert prepared.has_fingerprint(before, tmp_path) and prepared.has_fingerprint(other, tmp_path)
    assert not prepared.has_fingerprint(now, tmp_path)


def test_what_is_opened_is_shared_until_it_changes(shards, monkeypatch):
    opened = []
    make = grain.sources.ArrayRecordDataSource
    monkeypatch.setattr(
        grain.sources, "ArrayRecordDataSource", lambda *args: opened.append(1) or make(*args)
    )
    shards_lib.RecordSource(shards, "train")
    shards_lib.RecordSource(str(shards), "train")
    monkeypatch.chdir(shards)
    assert shards_lib.RecordSource(".", "train")[0].id == "0-0" and len(opened) == 1
    shards_lib.write_shard(shards / shards_lib.shard_name("train", 0, 3), [record("new")])
    assert shards_lib.RecordSource(shards, "train")[0].id == "new" and len(opened) == 2


def test_with_a_table_no_shard_is_read_to_open(shards, monkeypatch):
    read = [
        source_record.id
        for source_record in map(shards_lib.RecordSource(shards, "train").__getitem__, range(6))
    ]
    shards_lib.write_table(shards, "train")
    opened = []
    make = array_record_module.ArrayRecordReader
    monkeypatch.setattr(
        array_record_module, "ArrayRecordReader", lambda *a, **k: opened.append(a) or make(*a, **k)
    )
    source = shards_lib.RecordSource(shards, "train")
    assert len(source) == 6 and not opened
    assert [source[i].id for i in range(6)] == read and len(opened) == 3


def test_a_table_of_other_shards_is_a_user_error(shards):
    shards_lib.write_table(shards, "train")
    path = shards / shards_lib.shard_name("train", 1, 3)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(
        UserError, match=r"shards-train.npz is of other shards: train-00001-of-00003.*131,076 bytes"
    ):
        shards_lib.RecordSource(shards, "train")
    (shards / "shards-train.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"shards-train.npz cannot be read"):
        shards_lib.RecordSource(shards, "train")


def test_a_name_that_begins_with_another_splits_is_not_of_it(shards):
    shards_lib.write_shard(shards / shards_lib.shard_name("train-b", 0, 1), [record("b")])
    assert len(shards_lib.shard_names(shards, "train")) == 3
    assert shards_lib.shard_names(shards, "train-b") == ["train-b-00000-of-00001.array_record"]


def test_all_records_are_iterated_over(shards):
    source = shards_lib.RecordSource(shards, "train")
    assert [one.id for one in source] == [source[i].id for i in range(len(source))]
