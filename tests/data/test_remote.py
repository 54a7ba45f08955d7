"""Data in a bucket give what the same data on a disk give."""

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest

from alignvlm_jax import storage
from alignvlm_jax.data import filesystem, index, lengths, loader, shards, tokenizers
from alignvlm_jax.data import prepared as prepared_lib
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import TryAgainError, UserError
from alignvlm_jax.ingest import job
from tests.data.test_loader import change


@pytest.fixture(params=["merged", "of each shard"])
def prepared(request, data_dir, tmp_path):
    """The folder on this machine, with one index a split or with one a shard."""
    shutil.copytree(data_dir, tmp_path / "data")
    if request.param == "merged":
        job.recount(tmp_path / "data", str(data_dir / "tokenizer.model"))
    return tmp_path / "data"


@pytest.fixture
def remote(prepared, bucket, bucket_folder):
    """The same in a bucket."""
    upload(prepared, bucket, bucket_folder)
    yield str(bucket_folder)
    filesystem._remote_listing.cache_clear()


def upload(folder, bucket, bucket_folder) -> None:
    filesystem._remote_listing.cache_clear()
    prefix = str(bucket_folder).removeprefix(f"{bucket.url}/")
    for path in folder.iterdir():
        bucket.put(f"{prefix}/{path.name}", path.read_bytes())


def test_records_are_those_of_the_disk(prepared, remote):
    here = shards.RecordSource(prepared, "train")
    there = shards.RecordSource(remote, "train")
    assert len(here) == len(there) == 48
    order = np.random.default_rng(0).permutation(48).tolist()
    for number in order[:24]:
        there.prefetch(number)
    assert [there[i] for i in order] == [here[i] for i in order]


def test_a_record_is_one_request_and_opening_is_few(remote, bucket):
    bucket.requests.clear()
    source = shards.RecordSource(remote, "validation")
    assert bucket.requests["GET"] <= 3
    bucket.requests.clear()
    for number in range(10):
        source[number]
    assert bucket.requests == {"GET": 10}
    shards.RecordSource(remote, "validation")
    assert bucket.requests == {"GET": 10}  # it is shared


def test_rows_and_the_index_are_those_of_the_disk(prepared, remote, demo_config):
    def rows(folder):
        return loader.TrainSequences(
            change(demo_config, "data", dir=str(folder), packing="offline"), "train"
        )

    here = rows(prepared)
    there = rows(remote)
    for row in range(0, 40, 3):
        for name, array in here[row].items():
            assert np.array_equal(array, there[row][name])
    assert prepared_lib.fingerprint(prepared) == prepared_lib.fingerprint(remote)
    assert tokenizers.read(remote)[1] == tokenizers.read(prepared)[1]
    assert tokenizers.read(f"{remote}/tokenizer.model")[1] == tokenizers.read(prepared)[1]


def test_batches_are_read_ahead(prepared, remote, demo_config, bucket):
    """Each record by one request, and many of them at a time."""

    def batches(folder):
        config = change(demo_config, "data", dir=str(folder), packing="offline")
        return loader.TrainBatches(
            dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=8))
        )

    expected = list(batches(prepared))
    found = batches(remote)
    bucket.requests.clear()
    most = 0
    at_once = 0
    lock = threading.Lock()

    def hook(method, names):
        nonlocal most, at_once
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1

    bucket.hook = hook
    try:
        for here, there in zip(expected, found, strict=True):
            assert all(np.array_equal(here[name], there[name]) for name in here)
    finally:
        bucket.hook = lambda method, names: None
    records = sum(len(expected_batch["tokens"]) for expected_batch in expected)
    assert most > 16
    planned = loader.TrainSequences(
        change(demo_config, "data", dir=str(prepared), packing="offline"), "train"
    ).schedule
    assert bucket.requests["GET"] <= sum(planned.num_records(row) for row in range(records)) + 2


def test_what_is_missing_or_damaged_is_told(remote, prepared, bucket, bucket_folder):
    with pytest.raises(
        UserError, match=f"no shards of split 'trian' in {remote}; did you mean 'train'"
    ):
        shards.RecordSource(remote, "trian")
    with pytest.raises(
        UserError, match=r"no shards of split 'train' in gs://.*/nowhere; run `prepare` first"
    ):
        shards.RecordSource(f"{remote}/nowhere", "train")
    with pytest.raises(UserError, match="cannot list gs://nowhere/data: no such bucket"):
        shards.RecordSource("gs://nowhere/data", "train")
    with pytest.raises(UserError, match=f"cannot read tokenizer {remote}/deep/tokenizer.model"):
        tokenizers.read(f"{remote}/deep")
    name = shards.shard_names(prepared, "train")[1]
    whole = (prepared / name).read_bytes()
    at = whole.index(b'{"id"') + 40
    damaged = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
    for content, message in (
        (damaged, "cannot read record 24 of split 'train' in gs://"),
        (whole[:-100], "train"),
    ):
        (prepared / name).write_bytes(content)
        upload(prepared, bucket, bucket_folder)
        with pytest.raises(UserError, match=rf"{message}.*prepare") as error:
            source = shards.RecordSource(remote, "train")
            assert source[0] and source[23]
            source[24]
        assert "\n" not in str(error.value)
    bucket.remove(f"{remote.removeprefix(bucket.url + '/')}/{name}")
    filesystem._remote_listing.cache_clear()
    with pytest.raises(UserError, match="holds 1 of 2 shards"):
        shards.RecordSource(remote, "train")


def test_faults_that_pass_lose_no_record_and_others_are_no_damage(remote, bucket, monkeypatch):
    source = shards.RecordSource(remote, "train")
    with bucket.faulty(error_rate=0.2, cut_rate=0.1, lost_rate=0.1, seed=3):
        for number in range(48):
            source.prefetch(number)
        assert len({source[number].id for number in range(48)}) == 48
    assert bucket.requests["faults"] > 5
    # A record that the bucket does not give is not one that training may leave out.
    with (
        bucket.faulty(status=403, names="array_record"),
        pytest.raises(OSError, match="no permission"),
    ):
        source[3]


def test_a_bucket_that_is_silent_is_no_reason_to_delete_anything(remote, bucket, monkeypatch):
    """Of the shards, of the index and of the tokenizer: the command is started again later."""
    opened = [
        lambda: shards.RecordSource(remote, "train"),
        lambda: index.load(remote, "train"),
        lambda: tokenizers.load(f"{remote}/tokenizer.model"),
    ]
    filesystem.listing(remote)  # Else nothing would be asked but this.
    monkeypatch.setattr(storage.bucket_requests, "_patience", 0.2)
    monkeypatch.setattr(storage.bucket_requests, "MAX_PAUSE", 0.1)
    with bucket.faulty(error_rate=1.0):
        for read in opened:
            with pytest.raises(TryAgainError) as error:
                read()
            assert "delete" not in str(error.value) and "recount" not in str(error.value)
    for read in opened:
        read()


def test_the_index_is_that_of_the_disk(prepared, remote, demo_config):
    here = index.load(prepared, "train")
    there = index.load(remote, "train")
    assert (
        np.array_equal(here.content_hash, there.content_hash) and here.tokenizer == there.tokenizer
    )
    assert index.load(remote, "train") is there
    config = change(demo_config, "data", dir=remote)
    limits = lengths.Limits.of(config.data, config.model.vision, config.tokens_per_tile)

    def load():
        opened = StageData.open(config.data, config.model)
        return lengths.load(opened, [remote], "train", ["answer"], [48], limits)

    assert load() is load()
    with pytest.raises(ValueError, match="read-only"):
        load().tokens[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        there.content_hash[0] = 1
