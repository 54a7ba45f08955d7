import json

import pytest

from alignvlm_jax.commands import prepare
from alignvlm_jax.data import demonstration, sources, tokenizer_files
from alignvlm_jax.data.sources import RecordSource
from alignvlm_jax.errors import UserError


def arguments(out, **changes) -> list[str]:
    values = {"out": out, "num_train": 6, "num_eval": 3, "num_workers": 1} | changes
    return [f"--{name}={value}" for name, value in values.items()]


def records(path, split="train"):
    source = RecordSource(path, split)
    return [source[i] for i in range(len(source))]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepare") / "demo"
    prepare.main(arguments(path))
    return path


def test_writes_every_split_and_a_tokenizer(prepared):
    assert [len(records(prepared, split)) for split in ("train", "validation", "seen_fonts", "unseen_fonts")] == [
        6,
        3,
        3,
        3,
    ]
    assert tokenizer_files.load(prepared / "tokenizer.model").vocab_size <= 128
    assert json.loads((prepared / "prepare.json").read_text())["num_train"] == 6
    assert not [path.name for path in prepared.iterdir() if "partial" in path.name or path.suffix == ".tmp"]


def test_the_second_time_nothing_is_written(prepared, monkeypatch, capsys):
    monkeypatch.setattr(demonstration, "_write_shards", lambda *args: pytest.fail("prepared again"))
    prepare.main(arguments(prepared, num_workers=2))
    assert "ready" in capsys.readouterr().out


def test_shards_of_an_interrupted_run_are_kept_and_workers_change_nothing(prepared, tmp_path, monkeypatch):
    """Stops a run on three shards after the first, and lets two workers finish it."""
    monkeypatch.setattr(demonstration, "SHARD_SIZE", 3)
    train = demonstration.SentencePieceTokenizer.train
    monkeypatch.setattr(
        demonstration.SentencePieceTokenizer, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(UserError, match="goes on"):
        prepare.main(arguments(tmp_path / "demo"))
    assert not (tmp_path / "demo" / "prepare.json").exists()
    (staging,) = (tmp_path / "demo").glob(".partial-*")
    kept = staging / sources.shard_name("train", 0, 2)
    before = kept.stat().st_mtime_ns
    (staging / sources.shard_name("train", 1, 2)).unlink()
    (staging / sources.shard_name("validation", 0, 1)).unlink()
    monkeypatch.setattr(demonstration.SentencePieceTokenizer, "train", train)
    prepare.main(arguments(tmp_path / "demo", num_workers=2))
    assert (tmp_path / "demo" / kept.name).stat().st_mtime_ns == before
    for split in ("train", "validation"):
        assert records(tmp_path / "demo", split) == records(prepared, split)


def test_other_arguments_replace_the_data_and_no_other_files(prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(demonstration, "SHARD_SIZE", 3)
    prepare.main(arguments(out))
    others = {out / sources.shard_name(split, 0, 1) for split in ("mine", "train-mine")}
    for other in others:
        other.write_text("of somebody else")
    capsys.readouterr()
    prepare.main(arguments(out, seed=1, num_train=2))
    assert len(records(out)) == 2
    assert all(other.exists() for other in others)
    assert "train 2, train_small 2, validation 3, validation_small 3, seen_fonts 3, unse" in capsys.readouterr().out
    assert records(out)[0].images != records(prepared)[0].images


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        prepare.main(arguments(tmp_path / "file" / "demo"))


@pytest.mark.parametrize(
    "flag", ["--num_train=0", "--seed=-1", "--noise=nan", "--num_eval=x", "--format=slides", "--nosuch=1"]
)
def test_wrong_usage_exits_with_status_2(flag):
    with pytest.raises(SystemExit) as stopped:
        prepare.main([flag])
    assert stopped.value.code == 2
