"""Flags are checked before jax is imported: --help, and what is misspelt, are answered at once."""

import json
import subprocess
import sys

from alignvlm_jax.__main__ import COMMANDS
from alignvlm_jax.commands import usage

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
    (["train", *CONFIG, "--config.stages.stage1.optm.eps=1"], 1, "did you mean 'optim'?"),
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
        "did you mean '--image'; python -m",
    ),
    (["train", "--config=configs/dmo.py", "--workdir=x"], 1, "--config=demo comes with"),
    (["evaluate", "--checkpoint=nowhere"], 1, "no run at nowhere: there is no such folder"),
    (["evaluate", "--checkpoint=.", "--tasks=docvq"], 1, "did you mean 'docvqa'?"),
    (["report", "--workdir=nowhere"], 1, "no run at nowhere"),
    (["convert", "--export", "--checkpoint=.", "--out=x", "--components=lm"], 1, "'llm'"),
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


def test_one_process_of_several_looks_for_its_checkpoint_after_it_has_joined(monkeypatch, tmp_path):
    """Where it is missing on this host alone, the others have to be told."""
    monkeypatch.setenv("ALIGNVLM_NUM_PROCESSES", "2")
    usage.check_exists("checkpoint", tmp_path / "missing")
