import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from alignvlm_jax.commands import prepare
from alignvlm_jax.data import shards, tokenizers
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.synthetic import demonstration

REPOSITORY = pathlib.Path(__file__).parents[2]


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
    assert [
        len(records(prepared, split))
        for split in ("train", "validation", "seen_fonts", "unseen_fonts")
    ] == [
        6,
        3,
        3,
        3,
    ]
    assert tokenizers.load(prepared / "tokenizer.model").vocab_size <= 128
    assert json.loads((prepared / "prepare.json").read_text())["num_train"] == 6
    assert not [
        path.name for path in prepared.iterdir() if "partial" in path.name or path.suffix == ".tmp"
    ]


@pytest.mark.parametrize("package", ["pandas", "vega_datasets", "font_lato"])
def test_without_the_demonstrations_packages_it_says_what_to_install(package, tmp_path):
    """In a process of its own: another test may have imported them."""
    hidden = (
        f"import sys; sys.modules[{package!r}] = None; from alignvlm_jax.__main__ import main; "
    )
    call = f"sys.exit(main(['prepare', *{arguments(tmp_path / 'out')!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", hidden + call], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 1
    assert f"package {package}" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "pip install 'alignvlm_jax[demo]', or `make setup`" in last


def test_the_second_time_nothing_is_written(prepared, monkeypatch, capsys):
    monkeypatch.setattr(demonstration, "_write_shards", lambda *args: pytest.fail("prepared again"))
    prepare.main(arguments(prepared, num_workers=2))
    assert "ready" in capsys.readouterr().out


def test_shards_of_an_interrupted_run_are_kept_and_workers_change_nothing(
    prepared, tmp_path, monkeypatch
):
    """Stops a run on three shards after the first, and lets two workers finish it."""
    monkeypatch.setattr(demonstration, "SHARD_SIZE", 3)
    train = demonstration.SentencePieceTokenizer.train
    monkeypatch.setattr(
        demonstration.SentencePieceTokenizer,
        "train",
        lambda *args: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(UserError, match="goes on"):
        prepare.main(arguments(tmp_path / "demo"))
    assert not (tmp_path / "demo" / "prepare.json").exists()
    (staging,) = (tmp_path / "demo").glob(".partial-*")
    kept = staging / shards.shard_name("train", 0, 2)
    before = kept.stat().st_mtime_ns
    (staging / shards.shard_name("train", 1, 2)).unlink()
    (staging / shards.shard_name("validation", 0, 1)).unlink()
    monkeypatch.setattr(demonstration.SentencePieceTokenizer, "train", train)
    prepare.main(arguments(tmp_path / "demo", num_workers=2))
    assert (tmp_path / "demo" / kept.name).stat().st_mtime_ns == before
    for split in ("train", "validation"):
        assert records(tmp_path / "demo", split) == records(prepared, split)


def test_other_arguments_replace_the_data_and_no_other_files(
    prepared, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "demo"
    monkeypatch.setattr(demonstration, "SHARD_SIZE", 3)
    prepare.main(arguments(out))
    others = {out / shards.shard_name(split, 0, 1) for split in ("mine", "train-mine")}
    for other in others:
        other.write_text("of somebody else")
    capsys.readouterr()
    prepare.main(arguments(out, seed=1, num_train=2))
    assert len(records(out)) == 2
    assert all(other.exists() for other in others)
    assert (
        "train 2, train_small 2, validation 3, validation_small 3, seen_fonts 3, unse"
        in capsys.readouterr().out
    )
    assert records(out)[0].images != records(prepared)[0].images


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        prepare.main(arguments(tmp_path / "file" / "demo"))


@pytest.mark.parametrize(
    "flag",
    ["--num_train=0", "--seed=-1", "--noise=nan", "--num_eval=x", "--format=slides", "--nosuch=1"],
)
def test_wrong_usage_exits_with_status_2(flag):
    with pytest.raises(SystemExit) as stopped:
        prepare.main([flag])
    assert stopped.value.code == 2


@pytest.fixture
def source(tmp_path):
    """Flags that prepare two records of one's own."""
    records = [
        {"id": str(i), "turns": [{"question": "What?", "answers": [str(i)]}]} for i in range(2)
    ]
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + "{\n"
    )
    demonstration.SentencePieceTokenizer.train(tmp_path / "tokenizer.model", ["What?"])
    return [
        "--format=jsonl",
        f"--source={tmp_path}/mine.jsonl",
        f"--tokenizer={tmp_path}",
        f"--out={tmp_path}/out",
    ]


def test_ones_own_data_and_what_is_said_about_it(source, tmp_path, capsys):
    prepare.main([*source, "--num_workers=1", "--holdout=0"])
    assert [record.id for record in records(tmp_path / "out")] == ["0", "1"]
    printed = capsys.readouterr().out
    assert "train: 2 records, 0 images" in printed and "answer: 2 records, tokens mean" in printed
    assert f"rejected: 1 (see {tmp_path}/out/rejected.jsonl)\n  1: no JSON" in printed
    prepare.main([*source, "--holdout=0"])
    assert "ready" in capsys.readouterr().out
    prepare.main(["--recount", f"--out={tmp_path}/out", f"--tokenizer={tmp_path}"])
    assert "counted train 2 records" in capsys.readouterr().out


def test_a_tokenizer_is_needed(source, capsys):
    with pytest.raises(UsageError, match="--tokenizer=FILE_OR_FOLDER is needed; `make weights`"):
        prepare.main([flag for flag in source if not flag.startswith("--tokenizer")])
    with pytest.raises(UsageError, match="--tokenizer"):
        prepare.main(["--recount"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--format=jsonl"],
        ["--format=jsonl", "--source=x", "--num_train=3"],
        ["--format=jsonl", "--source=x", "--image_column=a"],
        ["--format=parquet", "--source=x", "--holdout=1.5"],
        ["--format=webdataset", "--source=x", "--holdout=nan"],
        ["--source=x"],
        ["--recount", "--source=x"],
    ],
)
def test_flags_of_other_formats_are_wrong_usage(flags):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(flags)
    assert stopped.value.code == 2


def test_flags_of_a_format_are_shown(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--format=parquet", "--help"])
    assert "--image_column" in capsys.readouterr().out


@pytest.mark.skipif(bool(importlib.util.find_spec("apache_beam")), reason="Apache Beam is there")
def test_beam_that_is_absent_is_a_user_error(source):
    with pytest.raises(UserError, match=r"Apache Beam is not installed; `make beam`"):
        prepare.main([*source, "--beam_runner=DirectRunner"])
    with pytest.raises(UsageError, match="name a --beam_runner"):
        prepare.main([*source, "--", "--direct_num_workers=2"])


def test_a_benchmark_is_one_split_and_keeps_questions_without_answers(tmp_path, prepared):
    source = tmp_path / "test.jsonl"
    lines = [
        {"id": str(i), "turns": [{"question": f"{i}?", "answers": ["1"] * (i % 2)}]}
        for i in range(20)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [
        f"--source={source}",
        f"--out={tmp_path / 'out'}",
        f"--tokenizer={prepared / 'tokenizer.model'}",
    ]
    prepare.main(["--format=jsonl", *flags, "--split=test", "--num_workers=1"])
    found = records(tmp_path / "out", "test")
    assert [record.id for record in found] == [line["id"] for line in lines]
    assert [len(record.turns[0].answers) for record in found] == [0, 1] * 10
    assert (
        shards.shard_paths(tmp_path / "out", "train")
        == shards.shard_paths(tmp_path / "out", "validation")
        == []
    )
    with pytest.raises(SystemExit):
        prepare.main(["--format=jsonl", *flags, "--split=a-b"])
