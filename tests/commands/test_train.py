"""The command as a user calls it, in a process of its own."""

import collections
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from alignvlm_jax import __main__ as main_lib
from alignvlm_jax.benchmarks import predictions
from alignvlm_jax.commands import next_commands
from alignvlm_jax.data import index, shards, tokenizers
from alignvlm_jax.ingest import job
from tests import fast_xla

REPOSITORY = Path(__file__).parents[2]
PINNED = json.loads((Path(__file__).parents[1] / "golden" / "predictions.json").read_text())
"""Checksums by kind of machine, of which a change of the code that should change no number must
change none. One that should: `kind()` and `checksum(...)` are what to write down."""
CONFIG = """
from alignvlm_jax import config as config_lib
from alignvlm_jax import presets

def get_config():
    config = config_lib.default_config_dict()
    config_lib.set_preset(config.model.vision, presets.VISION["tiny"])
    config_lib.set_preset(config.model.llm, presets.LLM["tiny"])
    config.model.image_token_id = 4
    config.model.vision.update(width=16, mlp_width=16, num_layers=1, num_heads=2)
    config.model.llm.update(width=16, mlp_width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
    config.train.update(num_steps=200, batch_size=4, log_every=1, validate_every=1000, checkpoint_every=1000)
    config.train.validation_sequences = 4
    config.data.update(dir="data", seq_len=192, max_tiles=2, tasks={"transcribe": 0.5, "answer": 0.5})
    config.data.update(full_cover=0.125, min_token_height=0.0, min_contrast=0)
    config.optim.learning_rate = 2e-3
    return config
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """A config of one small stage, and data for it."""
    root = tmp_path_factory.mktemp("train")
    (root / "config.py").write_text(CONFIG)
    prepare = run("prepare", f"--out={root}/data", "--num_train=32", "--num_eval=16")
    assert prepare.returncode == 0, prepare.stderr
    return [f"--config={root}/config.py", f"--config.data.dir={root}/data"]


def run(*argv: str, **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*argv), capture_output=True, text=True, cwd=REPOSITORY, env=environment(**changes)
    )


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "alignvlm_jax", *argv]


def environment(**changes: str) -> dict[str, str]:
    """One device, and XLA as users have it, but for `changes`."""
    ours = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return ours | {"JAX_PLATFORMS": "cpu"} | changes


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_the_same_command_does(
    flags, tmp_path, number, status
):
    workdir = tmp_path / "run"
    argv = command("train", *flags, f"--workdir={workdir}", "--config.seed=3")
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(XLA_FLAGS=fast_xla.FLAGS),
    )
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and metrics.read_text().count("\n") >= 2
    ):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status
    assert errors.count("\n") == 1
    assert errors.startswith("alignvlm_jax: stopped at step ")
    assert errors.strip().endswith(f"go on with: {' '.join(argv)}")
    stopped = int(errors.split("step ")[1].split()[0])
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(stopped)]

    resumed = run(*argv[3:], XLA_FLAGS=fast_xla.FLAGS)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr == ""
    assert f"going on from {workdir}/checkpoints/{stopped}" in resumed.stdout
    steps = [
        line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line
    ]
    assert steps == list(range(1, 201))


@pytest.fixture
def openings(monkeypatch) -> collections.Counter:
    """Counts, in this process, by what and where: a split's shards at every `RecordSource` that is
    made, its index at every `index.load`, and a tokenizer both at every `tokenizers.load` and
    whenever its file is read, as for a checksum. That some of these give what another one opened
    before is no excuse here: whoever asks again looks the folder's files up again."""
    counts = collections.Counter()

    def count(owner, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(*args):
            counts[what, *map(str, args[1:] if what == "shards" else args)] += 1  # Less `self`.
            return original(*args)

        monkeypatch.setattr(owner, name, counted)

    count(shards.RecordSource, "__init__", "shards")
    count(index, "load", "index")
    count(tokenizers, "load", "tokenizer")
    count(tokenizers, "read", "tokenizer file")
    return counts


@pytest.mark.parametrize("packing", ["none", "offline"])
def test_everything_is_opened_once(flags, tmp_path, openings, packing):
    """By one process, from the command to the end of a stage of one step with validation and
    generation: each split's shards and index once a stage, and the tokenizer once."""
    folder = f"{tmp_path}/data"
    shutil.copytree(flags[1].removeprefix("--config.data.dir="), folder)
    job.recount(Path(folder), f"{folder}/tokenizer.model")  # An index, which offline packing needs.
    openings.clear()
    argv = [
        flags[0],
        f"--config.data.dir={folder}",
        f"--workdir={tmp_path}/run",
        f"--config.data.packing={packing}",
        "--config.train.num_steps=1",
        "--config.train.batch_size=8",
        "--config.train.generate_every=1",
        "--config.train.generate_questions=4",
        "--config.eval.batch_size=8",
        "--config.eval.max_new_tokens=2",
    ]
    assert main_lib.main(["train", *argv]) == 0
    logged = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "validation/answer_loss" in logged and "generated/anls" in logged
    expected = {("tokenizer", folder), ("tokenizer file", folder)}
    for split in ("train", "validation"):
        expected.add(("shards", folder, split))
        # Without a plan, too, that of validation tells whether there is text to validate on.
        if packing == "offline" or split == "validation":
            expected.add(("index", folder, split))
    assert openings == dict.fromkeys(expected, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--config=demo"],
            "no folder data/demo, which the config reads by default: `prepare --format=documents "
            "--out=data/demo` makes it; another one is named by --config.data.dir=FOLDER",
        ),
        (
            ["--config=demo", "--config.data.dir=data/debian"],
            "no folder data/debian: `make data` makes it in a checkout",
        ),
        (
            ["--config=demo", "--config.data.dir=my pdfs", "--config.data.tokenizer=words"],
            "my pdfs: 2 files for pdf, yet to be prepared: ",
        ),
    ],
)
def test_data_that_are_not_there_or_not_prepared_name_the_command(
    tmp_path, monkeypatch, capsys, argv, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pdfs").mkdir()
    for name in "ab":
        (tmp_path / "my pdfs" / f"{name}.pdf").touch()
    assert main_lib.main(["train", *argv, "--workdir=run"]) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    if "yet to" in errors:
        assert "prepare --source='my pdfs' --out='data/my pdfs' --tokenizer=words, then" in errors


def test_a_run_on_documents_of_ones_own_is_asked_first(tmp_path):
    for name, described in (("demo", {"num_train": 3}), ("mine", {"format": "jsonl"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prepare.json").write_text(json.dumps(described))
    told = next_commands.after_train(Path("runs/my run"), [tmp_path / "demo", tmp_path / "mine"])
    assert [re.search(r"(\w+) --\w+='runs/my run'", line)[1] for line in told.splitlines()[1:]] == [
        "generate",
        "evaluate",
        "report",
    ]
    assert "--image=FILE --question=" in told
    assert "generate" not in next_commands.after_train(Path("runs/demo"), [tmp_path / "demo"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.optim.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--config.mesh.tensor=3"], "does not fit"),
        (["--config.data.dir=nowhere"], "nowhere"),
        (
            ["--config.train.trainable=('lm/.*',)"],
            "config.train.trainable 'lm/.*' matches no parameter",
        ),
        (["--workdir=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_status_1(flags, tmp_path, capsys, argv, message):
    words = [*flags, "--config.train.batch_size=8", f"--workdir={tmp_path}/run", *argv]
    # Each flag once, as the last one has it.
    once = {word.partition("=")[0]: word for word in words}
    assert main_lib.main(["train", *once.values()]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("alignvlm_jax: error: ") and errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    "argv",
    [["--workdir=x"], ["--config=FILE"], ["--config=FILE", "--workdir=x", "--no_such_flag=1"]],
)
def test_wrong_usage_is_status_2(flags, argv):
    argv = [flags[0] if arg == "--config=FILE" else arg for arg in argv]
    with pytest.raises(SystemExit) as exited:
        main_lib.main(["train", *argv])
    assert exited.value.code == 2


def kind() -> str:
    """Returns what sums of floating-point numbers depend on, with which XLA cuts and fuses them."""
    features = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return f"jax {jax.__version__}, {os.cpu_count()} cores of features {digest}"


def checksum(flags, workdir: Path) -> str:
    """Returns a checksum of what a run of a few seconds answers."""
    steps = [
        "--config.train.num_steps=120",
        "--config.optim.warmup_steps=5",
        "--config.optim.learning_rate=1e-2",
    ]
    for words in (
        ["train", *flags, f"--workdir={workdir}", *steps],
        ["evaluate", f"--checkpoint={workdir}", "--splits=seen_fonts", "--num_questions=16"],
    ):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    rows = predictions.read_all(workdir)["seen_fonts", False].rows
    answers = [[row["question"], row["prediction"]] for row in rows]
    assert len(answers) == 16 and len({answer for _, answer in answers}) > 1
    return hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]


def test_a_run_answers_as_it_did(flags, tmp_path):
    """What docs/results.md says of the same command on the same kind of machine and versions."""
    found = checksum(flags, tmp_path / "run")
    # On a kind of machine that is not known yet: as it does a second time.
    assert found == (PINNED.get(kind()) or checksum(flags, tmp_path / "again")), kind()
