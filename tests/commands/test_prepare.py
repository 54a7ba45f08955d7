import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from alignvlm_jax import config as config_lib
from alignvlm_jax.commands import next_commands, prepare
from alignvlm_jax.data import shards, tokenizers
from alignvlm_jax.data.shards import RecordSource
from alignvlm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from alignvlm_jax.errors import UsageError, UserError
from alignvlm_jax.ingest import formats, staging
from alignvlm_jax.report import examples_page, records_page
from alignvlm_jax.synthetic import demonstration, drawn
from tests.ingest.formats.pdf import make_pdf

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
        for split in ("train", "validation", "seen_fonts", "unseen_fonts_and_layouts")
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
    monkeypatch.setattr(drawn, "_write_shards", lambda *args: pytest.fail("prepared again"))
    prepare.main(arguments(prepared, num_workers=2))
    assert "ready" in capsys.readouterr().out


def test_shards_of_an_interrupted_run_are_kept_and_workers_change_nothing(
    prepared, tmp_path, monkeypatch
):
    """Stops a run on three shards after the first, and lets two workers finish it."""
    monkeypatch.setattr(drawn, "SHARD_SIZE", 3)
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
    monkeypatch.setattr(drawn, "SHARD_SIZE", 3)
    prepare.main(arguments(out))
    others = {out / shards.shard_name(split, 0, 1) for split in ("mine", "train-mine")}
    for other in others:
        other.write_text("of somebody else")
    capsys.readouterr()
    prepare.main([*arguments(out, seed=1, num_train=2), "--overwrite"])
    assert len(records(out)) == 2
    assert all(other.exists() for other in others)
    assert (
        "train 2, train_small 2, validation 3, validation_small 3, seen_fonts 3, unse"
        in capsys.readouterr().out
    )
    assert records(out)[0].images != records(prepared)[0].images


def test_crops_of_prepared_pages(manuals, tmp_path, capsys):
    """The data of a reader, twice; it has no tokenizer of its own."""
    flags = [f"--{name}={folder}" for name, folder in manuals.items()]
    call = ["--format=crops", *flags, *arguments(tmp_path / "out", num_eval=1)]
    prepare.main(call)
    assert "crops by split: train 6, validation 1, crops 1, natural 1" in capsys.readouterr().out
    drawn = records(tmp_path / "out")
    assert len(drawn) == 6 and all(record.turns for record in drawn)
    assert all(bool(record.lines) == (record.source != "text") for record in drawn)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "prepare.json" in names and not names & {"tokenizer.model", "tokenizer.json"}
    prepare.main(call)
    assert "is ready" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prepared with --num_train=6 .*--overwrite"):
        prepare.main([*call[:-3], "--num_train=7", "--num_eval=1"])


def test_crops_need_both_folders(manuals, capsys):
    source = f"--source={manuals['source']}"
    with pytest.raises(UsageError, match="--out=FOLDER is needed, as --out=data/reader"):
        prepare.main(["--format=crops", source, f"--unseen={manuals['unseen']}"])
    with pytest.raises(SystemExit):
        prepare.main(["--format=crops", source, "--out=x"])
    assert "--unseen" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        prepare.main(arguments(tmp_path / "file" / "demo"))


@pytest.mark.parametrize(
    "flag",
    ["--num_train=0", "--seed=-1", "--noise=nan", "--num_eval=x", "--nosuch=1"],
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
        ["--recount", "--source=x"],
        ["--format=jsonl", "--source=x", "--exclude=,"],
        ["--format=jsonl", "--source=x", "--exclude="],
        ["--format=jsonl", "--source=x", "--exclude=a,,b"],
    ],
)
def test_flags_of_other_formats_are_wrong_usage(flags):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(flags)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=pdf", "--questions="], "--questions: '' has an empty name"),
        (["--format=pdf", "--questions=tables,,keys"], "--questions: 'tables,,keys' has an empty"),
        (["--format=parquet", "--ignore_columns=,"], "--ignore_columns: ',' has an empty name"),
        (["--format=parquet", "--filter=a>1,"], "--filter has '', which is no COLUMN OP VALUE"),
        (["--format=jsonl", "--source="], "--source needs a value"),
        (["--source", ""], "--source needs a value"),
        (
            ["--format=jsonl", "--out=gs://bucket/a"],
            "--out=gs://bucket/a is in a bucket, and prepare",
        ),
        (["--out=gs://bucket/a"], "is in a bucket"),
        (["--format=jsonl", "--out=gs://"], "gs:// names no bucket"),
        (["--format=jsonl", "--out=gs:/bucket/a"], "has one slash after gs:"),
        (["--format=jsonl", "--source=gs://"], "gs:// names no bucket; expected gs://BUCKET/NAME"),
        (["--format=jsonl", "--source=gs:///a"], "gs:///a names no bucket"),
    ],
)
def test_what_is_empty_is_told(tmp_path, tokenizer, flags, message):
    """As of a variable of the shell that is not set: nothing would be left out in silence."""
    (tmp_path / "a.jsonl").write_text("{}")
    missing = [f"--source={tmp_path}", f"--out={tmp_path}/o", f"--tokenizer={tokenizer.name}"]
    names = [flag.partition("=")[0] for flag in flags]
    given = [flag for flag in missing if flag.partition("=")[0] not in names]
    with pytest.raises(UserError, match=message):
        prepare.main([*flags, *given])


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


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that prepares a folder of PDFs with so many pages each, without --format."""
    SentencePieceTokenizer.train(tmp_path / "tokenizer.model", ["Page 1"])

    def run(*num_pages, flags=(), out="out"):
        folder = tmp_path / "my files"
        folder.mkdir(exist_ok=True)
        for number, count in enumerate(num_pages):
            pages = [make_pdf.text(20, 100, f"page {number}.{page}") for page in range(count)]
            (folder / f"{number}.pdf").write_bytes(make_pdf.pdf(pages))
        flags = [f"--source={folder}", f"--out={tmp_path / out}", "--num_workers=1", *flags]
        prepare.main([*flags, f"--tokenizer={tmp_path}"])
        return tmp_path / out

    return run


def test_a_folder_is_looked_through_and_the_next_commands_are_given(own, tmp_path, capsys, png):
    (tmp_path / "my files").mkdir()
    (tmp_path / "my files" / "photo.png").write_bytes(png())
    out = own(1, 1, 1)
    printed = capsys.readouterr().out
    assert "my files: 3 files for pdf; 1 image (1 PNG)\n--format=pdf: PDF files" in printed
    assert "not read: 1 image (1 PNG). An image alone teaches nothing" in printed
    assert "validation: 1 record," in printed
    assert "Next, with words and no questions: both stages transcribe" in printed
    assert f"inspect --config=documents:FOLDER --data={out}\n" in printed
    train = f"train --config=documents:FOLDER --workdir=runs/out --config.data.dir={out}"
    assert train in printed and "FOLDER: a checkpoint" in printed
    own(1, 1, 1, flags=["--format=pdf", "--holdout=0.5", "--overwrite"])
    assert "not read: 1 image (1 PNG)." in capsys.readouterr().out


def test_the_next_commands_name_the_checkpoint_of_the_tokenizer(
    own, tmp_path, capsys, config, monkeypatch
):
    stages = json.dumps(config_lib.to_json((config,)))
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/one", "weights/other"):
        pathlib.Path(folder).mkdir(parents=True)
        pathlib.Path(folder, "config.json").write_text(stages)
    (tmp_path / "runs/one/config.json").write_text('{"model_type": "llama"}')
    own(1, 1)
    assert "documents:FOLDER" in capsys.readouterr().out
    changed = dataclasses.replace(config.data, tokenizer=str(tmp_path))
    stages = json.dumps(config_lib.to_json((dataclasses.replace(config, data=changed),)))
    pathlib.Path("weights/other/config.json").write_text(stages)
    own(1, 1)
    assert "--config=documents:weights/other --data=" in capsys.readouterr().out
    assert next_commands.checkpoint("tokenizer.model") == "weights/other"


def test_of_a_single_file_pages_are_held_out(own, capsys):
    out = own(3)
    assert "--holdout_by=page: pages of a single PDF are held out" in capsys.readouterr().out
    assert sorted(len(records(out, split)) for split in ("train", "validation")) == [1, 2]
    with pytest.raises(UserError, match=r"--holdout_by=page splits it by pages"):
        own(3, flags=["--holdout_by=document"], out="other")
    # Where no fraction is held out, one document will do.
    for flag, split in {
        "--holdout=0": "train",
        "--split=test": "test",
        "--holdout=1": "validation",
    }.items():
        out = own(3, flags=["--format=pdf", flag], out=split)
        assert len(records(out, split)) == 3


def test_scans_are_counted_and_told_what_to_do(own, tmp_path, capsys):
    scan = Image.new("RGB", (60, 40), "white")
    scan.putpixel((9, 9), (0, 0, 0))
    (tmp_path / "my files").mkdir()
    scan.save(tmp_path / "my files" / "scan.pdf")
    with pytest.raises(UserError, match=r"no record .*: a scan: give OCR .--ocr=FOLDER., a text "):
        own(flags=["--holdout_by=page"])
    own(1, 1)
    assert "  1: a scan: give OCR" in capsys.readouterr().out


def test_what_is_missing_is_named_with_a_whole_command(tmp_path):
    (tmp_path / "a b.pdf").write_bytes(make_pdf.pdf([""]))
    command = (
        rf"prepare --format=pdf --source='{tmp_path}/a b\.pdf' --out='data/a b' "
        r"--tokenizer=weights/smollm2/tokenizer --holdout_by=page$"
    )
    with pytest.raises(UsageError, match=rf"--out=FOLDER and --tokenizer=.* needed.*{command}"):
        prepare.main([f"--source={tmp_path}/a b.pdf"])


def test_a_format_that_is_not_known_is_wrong_usage():
    with pytest.raises(UsageError, match="--format is 'pfd'; did you mean 'pdf'"):
        prepare.main(["--format=pfd", "--source=x"])


@pytest.mark.parametrize("flags", [[], ["--source=nowhere"]])
def test_help_lists_the_formats(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        prepare.main([*flags, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name, kind in formats.REGISTRY.items():
        assert f"  {name:15}{kind.about}\n" in printed


@pytest.mark.parametrize("name", formats.REGISTRY)
def test_help_of_a_format_shows_its_schema(capsys, name):
    with pytest.raises(SystemExit):
        prepare.main([f"--format={name}", "--help"])
    assert formats.REGISTRY[name].schema in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "before", "now"),
    [
        ("--holdout=0.5", "--holdout=0.02", "--holdout=0.5"),
        ("--no-group_by_image", "--group_tokens=1024", "--no-group_by_image"),
        ("--shard_records=1", "--shard_records=1000", "--shard_records=1"),
    ],
)
def test_other_flags_write_no_folder_anew_unless_told_to(
    source, tmp_path, capsys, flag, before, now
):
    prepare.main([*source, "--num_workers=1"])
    found = (tmp_path / "out/prepare.json").read_text()
    with pytest.raises(UserError) as stopped:
        prepare.main([*source, "--num_workers=1", flag])
    message = str(stopped.value)
    assert f"was prepared with {before} (train 1, validation 1 records)" in message
    assert now in message and "--overwrite" in message and "another --out" in message
    assert (tmp_path / "out/prepare.json").read_text() == found
    assert not list((tmp_path / "out").glob(".partial*"))
    prepare.main([*source, "--num_workers=1", flag, "--overwrite"])
    assert (tmp_path / "out/prepare.json").read_text() != found


def test_another_tokenizer_is_told_of_recount(source, tmp_path):
    prepare.main([*source, "--num_workers=1"])
    texts = ["What is another tokenizer?"]
    demonstration.SentencePieceTokenizer.train(tmp_path / "tokenizer.model", texts)
    with pytest.raises(UserError, match=r"with --tokenizer=.* `prepare --recount`"):
        prepare.main([*source, "--num_workers=1"])


def test_what_changes_sides_is_told(source, tmp_path, capsys):
    prepare.main([*source, "--num_workers=1", "--holdout=0"])
    prepare.main([*source, "--num_workers=1", "--holdout=0.5", "--overwrite"])
    assert "of 2 records of train 1 now in validation" in capsys.readouterr().out
    # Another split of the folder is another job's, and changes none of these.
    prepare.main([*source, "--num_workers=1", "--split=test"])
    assert "held other data" not in capsys.readouterr().out


def test_documents_of_another_seed_are_not_drawn_over_others(prepared):
    with pytest.raises(UserError, match=r"--seed=0 \(.*train 6.*\), and this command has --seed=1"):
        prepare.main(arguments(prepared, seed=1))


def test_pages_that_inspect_drew_of_other_data_are_deleted(source, tmp_path, capsys):
    assert {*staging.DRAWN} == {examples_page.FILE, records_page.FILE}
    prepare.main([*source, "--num_workers=1", "--holdout=0"])
    for name in (*staging.DRAWN, "mine.html"):
        (tmp_path / "out" / name).write_text("of before")
    prepare.main([*source, "--num_workers=1", "--holdout=0"])
    assert (tmp_path / "out/rows.html").exists()
    capsys.readouterr()
    prepare.main([*source, "--num_workers=1", "--holdout=0.5", "--overwrite"])
    assert "rows.html and records.html showed what" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").glob("*.html")] == ["mine.html"]
    (tmp_path / "out/rows.html").write_text("of before")
    prepare.main(["--recount", f"--out={tmp_path}/out", f"--tokenizer={tmp_path}"])
    assert "rows.html showed what" in capsys.readouterr().out
