"""Flags are checked before jax is imported: --help, and what is misspelt, are answered at once."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from alignvlm_jax.__main__ import COMMANDS
from alignvlm_jax.commands import usage
from alignvlm_jax.errors import UserError
from alignvlm_jax.report import contents
from alignvlm_jax.weights import exported

SLOW = ("jax", "flax", "optax", "orbax", "grain", "matplotlib")
PROGRAM = f"""
import contextlib, io, json, sys
from alignvlm_jax import __main__ as program

for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            status = program.main(argv)
        except SystemExit as stop:
            status = stop.code
    imported = [name for name in {SLOW} if name in sys.modules]
    print(json.dumps([status, out.getvalue(), imported]))
"""
CONFIG = ["--config=demo", "--workdir=x"]
WRONG = [
    (["--version"], 0, "alignvlm_jax 0."),
    (["inspect", "--analysis=noise", "--help"], 0, "--relative_sigmas"),
    (["inspect", "--analysis=noise", "--kind=layout", "--sigmas=1"], 2, "--sigmas=1"),
    (
        ["inspect", "--analysis=pca", "--checkpoint=nowhere"],
        1,
        "no run at nowhere: there is no such folder",
    ),
    (["train", *CONFIG, "--config.train.batch_sise=2"], 1, "did you mean 'batch_size'?"),
    (["train", *CONFIG, "--config.stage=stage1"], 1, "did you mean 'stages'?"),
    (
        ["train", *CONFIG, "--config.stages.stage1.optm.eps=1"],
        1,
        "did you mean 'config.stages.stage1.optim.eps'?",
    ),
    (["train", "--config=dmeo", "--workdir=x"], 1, "did you mean 'demo'?"),
    (["plan", "--config=demo", "--topology=v5e:3x3"], 2, "v5e slices: 2x2"),
    (["prepare", "--format=nope"], 2, "--format is 'nope'; known: "),
    (
        ["generate", "--checkpoint=nowhere", "--question=a"],
        1,
        "no run at nowhere: there is no such folder",
    ),
    (["generate", "--checkpoint=README.md", "--question=a"], 1, "it is a file, no folder"),
    (["generate", "--checkpoint=x/runs/demo", "--question=a"], 1, "`make demo` makes it"),
    (
        ["generate", "--img=a", "--question=a", "--checkpoint=x"],
        2,
        "did you mean '--image'?; python -m",
    ),
    (["train", "--config=configs/dmo.py", "--workdir=x"], 1, "--config=demo comes with"),
    (["evaluate", "--checkpoint=nowhere"], 1, "no run at nowhere: there is no such folder"),
    (["evaluate", "--checkpoint=.", "--tasks=docvq"], 1, "did you mean 'docvqa'?"),
    (["report", "--workdir=nowhere"], 1, "no run at nowhere"),
    (["convert", "--export", "--checkpoint=.", "--out=x", "--components=lm"], 1, "'llm'"),
    # Another command's name of a flag, or another program's.
    (["train", *CONFIG, "--data=x"], 2, "did you mean '--config.data.dir'?"),
    (["train", "--config=demo", "--checkpoint=x"], 2, "did you mean '--workdir'?"),
    (["train", *CONFIG, "--batch_size=8"], 2, "did you mean '--config.train.batch_size'?"),
    (["train", *CONFIG, "--lr=8"], 2, "did you mean '--config.optim.learning_rate'?"),
    (["train", *CONFIG, "--num_step=8"], 2, "did you mean '--config.train.num_steps'?"),
    (["train", *CONFIG, "--config.batch_size=8"], 1, "did you mean 'config.train.batch_size' or"),
    (["evaluate", "--workdir=x"], 2, "did you mean '--checkpoint'?"),
    (["evaluate", "--checkpoint=x", "--config.data.dir=x"], 2, "did you mean '--data'?"),
    (["report", "--checkpoint=x"], 2, "did you mean '--workdir'?"),
    (["compare", "--checkpoint=x"], 2, "did you mean '--workdir'?"),
    (["generate", "--workdir=x", "--question=a"], 2, "did you mean '--checkpoint'?"),
    (["generate", "--checkpoint=x", "--prompt=Who is it?"], 2, "did you mean '--question'?"),
    (["inspect", "--workdir=x", "--analysis=noise"], 2, "did you mean '--checkpoint'?"),
    (["inspect", "--dir=x"], 2, "did you mean '--data'?"),
    (["prepare", "--input=x"], 2, "did you mean '--source'?"),
    (["convert", "--workdir=x", "--export"], 2, "did you mean '--checkpoint'?"),
    (["train", "demo", "--workdir=x", "--config=demo"], 2, "flags are --name=value"),
    # What is not there.
    (["train", *CONFIG, "--config.data.dir=/none"], 1, "there is no folder /none: `prepare`"),
    (
        ["prepare", "--source=docs/form.png", "--format=images", "--out=x", "--tokenizer=/none"],
        1,
        "no tokenizer at /none",
    ),
    (["prepare", "--recount", "--out=x", "--tokenizer=/none"], 1, "no tokenizer at /none"),
    (["compare", "--workdir=docs"], 1, "docs has no runs named TABLE/ROW_seedN"),
    # Given twice.
    (["evaluate", "--checkpoint=x", "--checkpoint=y"], 2, "given twice, as 'x' and 'y'"),
    (["evaluate", "--checkpoint", "x", "--checkpoint=y"], 2, "given twice, as 'x' and 'y'"),
    (["train", *CONFIG, "--workdir=y"], 2, "--workdir is given twice, as 'x' and 'y'"),
    (["train", *CONFIG, "--config=debug"], 2, "--config is given twice, as 'demo' and 'debug'"),
    (["train", *CONFIG, "--config.seed=1", "--config.seed=2"], 2, "given twice, as '1' and '2'"),
    (["inspect", "--data=x", "--num_rows=1", "--num_sequences=2"], 2, "given twice, as '1'"),
    # Without effect beside what else is given.
    (["generate", "--checkpoint=x", "--question=a", "--page=2"], 2, "--page needs --image"),
    (["inspect", "--data=x", "--stage=stage1"], 2, "--stage needs --config"),
    (["inspect", "--data=x", "--config.seed=1"], 2, "--config.seed needs --config"),
    (["inspect", "--data=x", "--page=2"], 2, "--page needs --analysis=lens"),
    (["inspect", "--data=x", "--record=a", "--num_records=2"], 2, "--num_records chooses records"),
    (["inspect", "--data=x", "--filter=a", "--num_sequences=2"], 2, "of packed sequences"),
    (["inspect", "--analysis=lens", "--checkpoint=x", "--split=a"], 2, "--analysis=lens reads"),
    (["convert", "--llm=a", "--vision=b", "--out=x", "--components=llm"], 2, "needs --export"),
    (["convert", "--llm=a", "--vision=b", "--out=x", "--format=transformers"], 2, "needs --export"),
    (["convert", "--import=.", "--out=x", "--connector=mlp"], 2, "--connector is of --llm and"),
    (["generate", "--checkpoint=x", "--question=a", "--top_p=0.9"], 2, "needs --temperature"),
    (["generate", "--checkpoint=x", "--question=a", "--seed=1"], 2, "needs --temperature"),
    (["convert", "--export", "--checkpoint=.", "--out=x", "--llm=a"], 2, "--export reads one"),
    (["plan", "--config=demo", "--topology=v5e:2x2", "--generate", "--mesh=auto"], 2, "--mesh="),
    (["prepare", "--format=images", "--source=x", "--split=a", "--holdout=0.1"], 2, "takes all"),
    (
        ["prepare", "--format=images", "--source=x", "--split=a", "--group_tokens=9"],
        2,
        "needs --group_by_image",
    ),
]


def run(calls: list[list[str]]) -> list[tuple[int, str]]:
    """Returns the exit status of each command line, and what it prints; it must have imported
    nothing that is slow."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    for argv, (_, printed, imported) in zip(calls, answers, strict=True):
        assert not imported, (argv, printed)
    return [(status, printed) for status, printed, _ in answers]


def test_help_and_a_misspelt_flag():
    helps = run([[command, "--help"] for command in COMMANDS])
    misspelt = run([[command, "--misspelt=1"] for command in COMMANDS])
    for command, (status, printed), (wrong, error) in zip(COMMANDS, helps, misspelt, strict=True):
        assert status == 0 and f"python -m alignvlm_jax {command}" in printed
        assert wrong == 2 and f"python -m alignvlm_jax {command}: error: " in error


def test_what_is_wrong_without_a_look_at_the_model():
    answers = run([argv for argv, _, _ in WRONG])
    for (argv, status, message), (returned, printed) in zip(WRONG, answers, strict=True):
        assert returned == status and message in printed, (argv, printed)


def test_a_page_that_cannot_be_read_is_told_before_jax_is_imported(tmp_path):
    """Nor is a model loaded, which takes ten seconds."""
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.pdf").write_bytes(b"%PDF-1.4\n")
    page = tmp_path / "page.png"
    Image.new("RGB", (16, 16), "white").save(page)
    (tmp_path / "half.png").write_bytes(page.read_bytes()[:60])
    Image.new("RGB", (16, 16), "white").save(tmp_path / "one.pdf")
    wrong = {
        ("text.png", 1): "cannot read image",
        ("half.png", 1): "cannot read image",
        ("page.png", 2): "has no page 2: it is an image",
        ("cut.pdf", 1): "cut.pdf",
        ("one.pdf", 3): "has no page 3",
        ("one.pdf", 0): "has no page 0",
        ("none.png", 1): "no image at",
    }
    asked = ["--question=a"], ["--analysis=lens"]
    calls = [
        [name, f"--checkpoint={tmp_path / 'run'}", f"--image={tmp_path / file}", *more, page]
        for (file, number) in wrong
        for page in [f"--page={number}"]
        for name, more in zip(("generate", "inspect"), asked, strict=True)
    ]
    messages = [message for message in wrong.values() for _ in asked]
    for (status, printed), message in zip(run(calls), messages, strict=True):
        assert status == 1 and message in printed and printed.count("\n") == 1, printed


def test_a_run_without_a_checkpoint_says_whether_one_comes(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            [{"train": {"checkpoint_every": 500, "num_steps": 90, "checkpoint_minutes": 15}}]
        )
    )
    (tmp_path / "checkpoints").mkdir()
    beat = {"process": 0, "host": "here", "pid": 7, "step": 3, "total": 200, "phase": "training"}
    ages = {"training": 0, "stopped": 0, "saving": 300}
    answers = []
    for phase, age in ages.items():
        (tmp_path / "heartbeats").mkdir(exist_ok=True)
        (tmp_path / "heartbeats" / "host-0.json").write_text(
            json.dumps(beat | {"phase": phase, "time": time.time() - age})
        )
        for call in (["generate", "--question=a"], ["evaluate"], ["inspect", "--analysis=pca"]):
            answers += run([[*call, f"--checkpoint={tmp_path}"]])
    first = "the first comes at step 90, or after 15 min if that is earlier"
    for status, printed in answers:
        assert status == 1 and f"no checkpoint in {tmp_path}" in printed and first in printed
    for (_, printed), state in zip(
        answers[::3],
        (
            "yet: process 0 on here (pid 7) is training in it, training at step 3 of 200",
            "its run has stopped at step 3 of 200",
            "has been silent for 30",
        ),
        strict=True,
    ):
        assert state in printed


def test_one_process_of_several_looks_for_its_checkpoint_after_it_has_joined(monkeypatch, tmp_path):
    """Where it is missing on this host alone, the others have to be told."""
    monkeypatch.setenv("ALIGNVLM_NUM_PROCESSES", "2")
    usage.check_exists("checkpoint", tmp_path / "missing")


def test_an_exported_model_is_not_written_into(tmp_path):
    """It is handed on as it is; and its config.json is no run's."""
    (tmp_path / usage.EXPORTED).write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    usage.check_run(tmp_path)
    calls = [
        ["train", "--config=demo", f"--workdir={tmp_path}"],
        ["evaluate", f"--checkpoint={tmp_path}"],
        ["report", f"--workdir={tmp_path}"],
        ["inspect", "--analysis=pca", f"--checkpoint={tmp_path}"],
        ["inspect", "--analysis=lens", f"--checkpoint={tmp_path}", "--image=docs/form.png"],
    ]
    for status, printed in run(calls):
        assert status == 1 and f"`convert --import={tmp_path} --out=DIR` makes one" in printed
    (tmp_path / usage.EXPORTED).unlink()
    [(status, printed)] = run(calls[:1])
    assert status == 1 and f"{tmp_path / 'config.json'} is no run's" in printed
    assert (tmp_path / "config.json").read_text() == "{}"
    with pytest.raises(UserError, match=r"config\.json: this is no config of a run, which is a"):
        contents.read(tmp_path)
    assert usage.EXPORTED == exported.FILE
