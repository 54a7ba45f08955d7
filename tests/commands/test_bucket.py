"""Every command on a workdir in a bucket."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import alignvlm_jax
from alignvlm_jax import __main__ as program
from alignvlm_jax import config as config_lib
from alignvlm_jax import storage
from alignvlm_jax.benchmarks import predictions
from alignvlm_jax.commands import convert, evaluate, generate, inspect, report
from alignvlm_jax.errors import UserError
from alignvlm_jax.storage import bucket_requests
from alignvlm_jax.train import restore
from tests.commands.test_convert import convert_to, published, tensors_of  # noqa: F401


@pytest.fixture
def workdir(trained_workdir, bucket_folder):
    """The trained workdir, in a bucket; its documents stay here."""
    run = bucket_folder / "run"
    for name in storage.files_below(trained_workdir / "checkpoints"):
        storage.copy_file(trained_workdir / "checkpoints" / name, run / "checkpoints" / name)
    config = restore.load_config(trained_workdir)
    storage.write_whole(run / "config.json", json.dumps(config_lib.to_json((config,))))
    storage.copy_file(trained_workdir / "tokenizer.model", bucket_folder / "tokenizer.model")
    return run


@pytest.fixture
def page(tmp_path):
    Image.new("RGB", (16, 16), "white").save(tmp_path / "page.png")
    return tmp_path / "page.png"


def test_evaluate_and_report(workdir, trained_workdir, capsys):
    evaluate.main([f"--checkpoint={workdir}", "--splits=seen_fonts", "--num_questions=4"])
    assert f"Written to {workdir}/predictions" in capsys.readouterr().out
    assert json.loads((workdir / "summary.json").read_text())["num_eval"] == 4
    names = storage.files_below(workdir / "predictions")
    assert names == ["seen_fonts.jsonl", "seen_fonts_blind.jsonl"]
    report.main([f"--workdir={workdir}"])
    assert f"Written: {workdir}/report.html" in capsys.readouterr().out
    assert "seen fonts" in (workdir / "report.html").read_text().replace("_", " ")


def test_generate_inspect_and_load(workdir, trained_workdir, bucket_folder, page, capsys):
    """With the page and the tokenizer in the bucket, too."""
    storage.copy_file(page, bucket_folder / "page.png")
    asked = ["--question=Who?", "--max_new_tokens=3"]
    generate.main([f"--checkpoint={trained_workdir}", f"--image={page}", *asked])
    expected = capsys.readouterr().out
    in_bucket = [
        f"--checkpoint={workdir}/checkpoints/7",
        f"--image={bucket_folder}/page.png",
        f"--data={bucket_folder}",
    ]
    generate.main([*in_bucket, *asked])
    assert capsys.readouterr().out == expected
    inspect.main(["--analysis=lens", *in_bucket])
    assert "What the patches of page.png say" in (workdir / "lens.html").read_text()
    model = alignvlm_jax.load(os.fspath(workdir), data=os.fspath(bucket_folder))
    assert model.answer(
        f"{bucket_folder}/page.png", "Who?", max_new_tokens=3
    ) == expected.removesuffix("\n")


def test_convert_there_and_back(published, bucket_folder, tmp_path):  # noqa: F811
    out = bucket_folder / "start"
    convert_to(out, published)
    with pytest.raises(UserError, match=f"{out} exists; take another --out"):
        convert_to(out, published)
    exported = bucket_folder / "exported"
    convert.main(["--export", f"--checkpoint={out}", f"--out={exported}"])
    names = storage.files_below(exported)
    assert storage.INCOMPLETE not in [*names, *storage.files_below(out)]
    before = tensors_of(published / "llm")
    here = tmp_path / "llm"
    here.mkdir()
    for name in storage.files_below(exported / "llm"):
        storage.copy_file(exported / "llm" / name, here / name)
    after = {name: x for path in here.glob("*.safetensors") for name, x in load_file(path).items()}
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_answers_go_on_after_a_kill(bucket_folder):
    """Under the partial name until they are all there; what is there is whole lines."""
    path = predictions.path_of(bucket_folder, "seen", False)
    header = {"split": "seen"}
    writer = predictions.Writer(path, header)
    writer.append([{"id": "1"}])
    storage.sync_all()
    writer.append([{"id": "2"}])  # Lost: not written out yet.
    writer._file._kept.clear()
    writer._file.close()
    assert not path.exists() and predictions.read_all(bucket_folder) == {}
    again = predictions.Writer(path, header)
    assert [row["id"] for row in again.predictions.rows] == ["1"]
    again.append([{"id": "2"}])
    again.publish()
    assert [row["id"] for row in predictions.read(path).rows] == ["1", "2"]
    assert storage.files_below(bucket_folder) == ["predictions/seen.jsonl"]


COMMANDS = {
    "evaluate": ["evaluate", "--checkpoint=gs://{bucket}/run"],
    "generate": ["generate", "--checkpoint=gs://{bucket}/run", "--question=Who?"],
    "report": ["report", "--workdir=gs://{bucket}/run"],
    "compare": ["compare", "--workdir=gs://{bucket}/run"],
    "export": ["convert", "--export", "--checkpoint=gs://{bucket}/run", "--out=gs://{bucket}/out"],
}
FAULTS = {
    "no permission": ({"status": 403}, "no permission", 1),
    "down": ({"error_rate": 1.0}, "Cloud Storage does not answer", 75),
    "gone": ({"lost_rate": 1.0}, "Cloud Storage does not answer", 75),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bucket_that_cannot_be_used_is_one_line(bucket, monkeypatch, capsys, command, fault):
    monkeypatch.setattr(bucket_requests, "_patience", 0.5)
    changes, message, expected = FAULTS[fault]
    with bucket.faulty(**changes):
        status = program.main([text.format(bucket="bucket") for text in COMMANDS[command]])
    printed = capsys.readouterr().err
    assert status == expected and printed.count("\n") == 1
    assert printed.startswith("alignvlm_jax: error: gs://bucket") and message in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bucket_that_is_not_there_is_one_line(bucket, capsys, command):
    status = program.main([text.format(bucket="elsewhere") for text in COMMANDS[command]])
    printed = capsys.readouterr().err
    assert status == 1 and printed.count("\n") == 1 and "gs://elsewhere" in printed


def test_without_a_network_it_takes_seconds():
    """And one line; nothing answers at this port."""
    environment = os.environ | {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "alignvlm_jax", "report", "--workdir=gs://bucket/run"]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 75
    assert (
        done.stderr.count("\n") == 1
        and "gs://bucket/run" in done.stderr
        and "does not answer" in done.stderr
    )
    # Of which loading the program is the most, on a busy machine.
    assert time.monotonic() - began < 120


def test_one_slash_is_wrong_usage(capsys):
    assert program.main(["report", "--workdir=gs:/bucket/run"]) in (1, 2)
    assert "did you mean gs://bucket/run?" in capsys.readouterr().err
