"""Sweeps: their runs, and the script that lists, runs and submits them."""

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignvlm_jax import config as config_lib
from alignvlm_jax.models.connectors import REGISTRY
from alignvlm_jax.train.checkpoint_files import COMMITTED
from tests.conftest import tiny_config

ROOT = Path(__file__).parent.parent.parent
SWEEPS = ROOT / "configs" / "sweeps"

spec = importlib.util.spec_from_file_location("launch_sweep", ROOT / "launch" / "sweep.py")
sweep = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = sweep
spec.loader.exec_module(sweep)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("connectors.py", 3 * len(REGISTRY)),
        ("connectors.py:stage2.py", 9 * len(REGISTRY)),
        ("learning_rates.py", 4 * len(REGISTRY)),
        ("learning_rates.py:stage2.py:llama32_1b", 4 * len(REGISTRY)),
        ("ablations.py", 21),
        ("ablations.py:stage1.py:llama31_8b", 21),
        ("compare.py", 54),
        ("compare.py:connectors,supervision", 39),
        ("align_wins.py", 76),
    ],
)
def test_every_run_is_a_valid_command(tmp_path, name, count):
    runs = sweep.read(f"{SWEEPS}/{name}", str(tmp_path))
    assert len(runs) == count
    assert len({tuple(run.arguments[1:-1]) for run in runs}) == count  # no two runs are one
    assert all(run.state() == "not started" and run.num_steps >= 500 for run in runs)


def test_a_table_that_is_none_names_the_nearest(tmp_path, capsys):
    assert sweep.main([f"{SWEEPS}/compare.py:conectors", f"--workdir={tmp_path}"]) == 1
    assert (
        "no table 'conectors' of the comparison; did you mean 'connectors'?"
        in capsys.readouterr().err
    )


def test_settings_start_from_the_towers_that_the_sweep_trains(tmp_path, capsys):
    for form, folder in (("whole", "runs/align_wins"), ("short", "elsewhere/short/")):
        runs = sweep.read(f"{SWEEPS}/align_wins.py:{form}", folder)
        sources = [
            argument.partition("=")[2]
            for run in runs
            for argument in run.arguments
            if argument.startswith("--config.init_from=")
        ]
        assert set(sources) == {run.workdir for run in runs if "/towers/" in run.workdir}
        # All but the run that trains the vision encoder of all start from another.
        assert len(runs) == len({run.name for run in runs}) == len(sources) + 1
    # Each setting with each connector once, in a few steps.
    assert len(runs) == 28 and max(run.num_steps for run in runs) < 100
    assert "28 runs, about " in capsys.readouterr().err
    assert sweep.main([f"{SWEEPS}/align_wins.py:shrt", f"--workdir={tmp_path}"]) == 1
    assert "no form 'shrt' of the sweep; did you mean 'short'?" in capsys.readouterr().err


TWO = """
def sweep(field="seed"):
    yield "first", "configs/demo.py", {field: 1}
    yield "second", "configs/demo.py:mlp", {field: 2}
"""


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(TWO)
    return path


def steps(workdir: Path, *names: str) -> None:
    for name in names:
        (workdir / "checkpoints" / name).mkdir(parents=True)
        (workdir / "checkpoints" / name / COMMITTED).touch()


def test_lists_and_skips_what_is_finished(two, folder, capsys):
    """Here and in a bucket; what orbax has not finished, or only begun, is no checkpoint."""
    first, total = (run.num_steps for run in sweep.read(str(two), "runs"))
    steps(folder / "runs" / "first", "100", str(first))
    steps(folder / "runs" / "second", "100", f"{total}.orbax-checkpoint-tmp")
    begun = folder / "runs" / "second" / "checkpoints" / str(total)
    begun.mkdir(parents=True)
    (begun / "metadata").touch()
    arguments = [str(two), f"--workdir={folder}/runs"]
    assert sweep.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        "first   finished",
        f"second  at step 100 of {total}",
    ]
    assert sweep.main([*arguments, "--run", "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"{sys.executable} -m alignvlm_jax train --config=configs/demo.py:mlp --config.seed=2 "
        f"--workdir={folder}/runs/second"
    ]


def command(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "launch.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_run_that_fails_does_not_keep_the_others_from_starting(two, tmp_path, capfd):
    script = command(
        tmp_path, f'echo "$@" >> {tmp_path}/started; case "$*" in *seed=1*) exit 3;; esac'
    )
    assert (
        sweep.main([str(two), f"--workdir={tmp_path}/runs", f"--submit={script} --nodes=2 --"]) == 1
    )
    started = (tmp_path / "started").read_text().splitlines()
    assert [line.split(" --workdir")[0] for line in started] == [
        "--nodes=2 -- train --config=configs/demo.py --config.seed=1",
        "--nodes=2 -- train --config=configs/demo.py:mlp --config.seed=2",
    ]
    assert "error: 1 of 2 failed: first" in capfd.readouterr().err


def test_every_run_gets_what_follows_the_dashes(two, tmp_path, capsys):
    arguments = [str(two), f"--workdir={tmp_path}/runs", "--run", "--dry_run", "--"]
    assert sweep.main([*arguments, "--config.init_from=runs/a b", "--config.name=all"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [command[5:-1] for command in commands] == [
        ["--config.init_from=runs/a b", "--config.name=all", f"--config.seed={seed}"]
        for seed in (1, 2)
    ]
    # What the sweep varies it sets itself.
    assert sweep.main([*arguments, "--config.seed=9"]) == 1
    assert "run first: --config.seed is given twice, as '9' and '1'" in capsys.readouterr().err
    assert sweep.main([*arguments, "--config.sede=9"]) == 1
    assert sweep.main([*arguments, "--seed=9"]) == 2
    assert "config fields, as --config.seed=1, not '--seed=9'" in capsys.readouterr().err


CHAIN = """
def sweep():
    yield "tower", "configs/demo.py", {"seed": 1}
    yield "reads", "configs/compare.py:connectors", {"init_from": "RUNS/tower", "seed": 2}
    yield "other", "configs/demo.py", {"seed": 3}
"""


def test_runs_at_a_time_share_the_cores_and_wait_for_what_they_start_from(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sweep, "num_cores", lambda: 2)
    (tmp_path / "chain.py").write_text(CHAIN.replace("RUNS", f"{tmp_path}/runs"))
    runs = sweep.read(f"{tmp_path}/chain.py", f"{tmp_path}/runs")
    # The first run ends only when the third has begun: both must be up, and the second waits.
    script = command(
        tmp_path,
        f"""
        echo begin $* >> {tmp_path}/log; taskset -cp $$ 2> /dev/null
        case "$*" in
          *seed=1*) while ! grep -q 'begin.*seed=3' {tmp_path}/log; do sleep 0.05; done;;
          *seed=3*) exit 3;;
        esac
        echo end $* >> {tmp_path}/log""",
    )
    assert sweep.start(runs, [str(script)], 2) == 1
    lines = [
        (line.split()[0], line[line.index("seed=") + 5])
        for line in (tmp_path / "log").read_text().splitlines()
    ]
    assert sorted(lines[:2]) == [("begin", "1"), ("begin", "3")]
    assert lines[2:] == [("end", "1"), ("begin", "2"), ("end", "2")]
    out, err = capsys.readouterr()
    assert f"other  failed, see {tmp_path}/runs/other.log; " in out and "0 left" in out
    assert "error: 1 of 3 failed: other" in err
    cores = sorted(os.sched_getaffinity(0))
    # Each has half of the cores, and this process all of them again.
    for name, share in (("tower", 0), ("other", 1)):
        told = (tmp_path / "runs" / f"{name}.log").read_text()
        if len(cores) == 2:
            assert told.strip().endswith(f": {cores[share]}")


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_starts_from_a_run_that_failed_is_not_started(tmp_path, capsys, jobs):
    source = f"{tmp_path}/./runs//tower/checkpoints/100"
    (tmp_path / "chain.py").write_text(CHAIN.replace("RUNS/tower", source))
    script = command(tmp_path, f'echo $* >> {tmp_path}/log; case "$*" in *seed=1*) exit 3;; esac')
    runs = sweep.read(f"{tmp_path}/chain.py", f"{tmp_path}/runs")
    assert sweep.start(runs, [str(script)], jobs) == 1
    assert "seed=2" not in (tmp_path / "log").read_text()
    assert "seed=3" in (tmp_path / "log").read_text()
    out, err = capsys.readouterr()
    assert "reads  not started: tower failed" in out
    assert "error: 1 of 3 failed: tower; 1 that start from them left out" in err


def test_a_run_does_not_start_from_one_whose_name_begins_alike():
    def run_of(workdir: str, source: str) -> sweep.Run:
        stage = dataclasses.replace(tiny_config(), init_from=source)
        return sweep.Run(workdir, [], workdir, (stage,))

    run = run_of("runs/tower", "")
    assert not run.starts_from(run)
    for source, expected in (
        ("runs/tower/", True),
        ("./runs/tower/checkpoints/7", True),
        (f"{ROOT}/runs/tower", True),
        ("runs/tower2", False),
        ("gs://runs/tower", False),
    ):
        assert run_of("runs/b", source).starts_from(run) == expected


def test_runs_that_start_from_one_another_are_named(tmp_path, capsys):
    (tmp_path / "ring.py").write_text(
        "def sweep():\n"
        "    for name, other in ('ab', 'ba'):\n"
        f"        yield name, 'configs/compare.py', {{'init_from': f'{tmp_path}/runs/{{other}}'}}\n"
    )
    assert sweep.main([f"{tmp_path}/ring.py", f"--workdir={tmp_path}/runs", "--run"]) == 1
    assert "error: runs that start from one another: a, b" in capsys.readouterr().err


def test_no_run_is_left_alone_where_another_cannot_be_started(two, tmp_path, capsys):
    (tmp_path / "runs" / "second.log").mkdir(parents=True)
    script = command(tmp_path, "while true; do sleep 0.05; done")
    assert sweep.start(sweep.read(str(two), f"{tmp_path}/runs"), [str(script)], 2) == 1
    assert "runs/second.log: Is a directory" in capsys.readouterr().err
    assert subprocess.run(["pgrep", "-f", script], stdout=subprocess.DEVNULL).returncode == 1


def signalled(tmp_path: Path, sent: signal.Signals, arguments: list, count: int):
    """Sends a signal once so many runs are up; returns the exit status, what stands on stderr, and
    what the runs of `saving` have written."""
    log = tmp_path / "log"
    sweeping = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not log.exists() or len(log.read_text().split()) < count:
            assert sweeping.poll() is None, sweeping.stderr.read()
            time.sleep(0.05)
        # As a terminal does it, Ctrl-C goes to the whole process group.
        send = os.killpg if sent == signal.SIGINT else os.kill
        send(sweeping.pid, sent)
        _, error = sweeping.communicate(timeout=30)
    finally:
        sweeping.kill()
    return sweeping.returncode, error, log.read_text().split()


def saving(tmp_path: Path, name: str, status: int) -> Path:
    """A command that runs until a signal of this name comes, and saves then."""
    return command(tmp_path, f"trap 'sleep 1; echo saved >> {tmp_path}/log; exit {status}' {name}; "
                             f"echo up >> {tmp_path}/log\n"
                   "while true; do sleep 0.05; done")  # fmt: skip


def submitted(two: Path, tmp_path: Path, script: Path) -> list:
    return [ROOT / "launch" / "sweep.py", two, f"--workdir={tmp_path}/runs", f"--submit={script}"]


def test_sigterm_ends_what_runs(two, tmp_path):
    arguments = submitted(two, tmp_path, saving(tmp_path, "TERM", 143))
    status, _, log = signalled(tmp_path, signal.SIGTERM, arguments, 1)
    assert status == 143 and log == ["up", "saved"]


def test_more_runs_at_a_time_than_cores_are_refused(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "num_cores", lambda: 2)
    arguments = [str(two), f"--workdir={tmp_path}/runs"]
    for more, message in (
        (["--run", "--jobs=3"], "--jobs is 3; this machine has cores for 1 to 2"),
        (["--run", "--jobs=0"], "--jobs is 0"),
        (["--jobs=2"], "--jobs needs --run"),
        (["--run", "--jobs=2", "--workdir=gs://b/runs"], "gs://b/runs is no folder here"),
    ):
        with pytest.raises(SystemExit) as stopped:
            sweep.main([*arguments, *more])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_ctrl_c_waits_for_the_run_to_save_and_starts_no_other(two, tmp_path):
    arguments = submitted(two, tmp_path, saving(tmp_path, "INT", 1))
    status, error, log = signalled(tmp_path, signal.SIGINT, arguments, 1)
    assert status == 1 and "the same command goes on" in error
    assert log == ["up", "saved"]


def test_ctrl_c_waits_for_all_that_run_at_a_time(two, tmp_path):
    script = saving(tmp_path, "INT", 1)
    code = (
        "import sys; from launch import sweep; "
        f"sys.exit(sweep.start(sweep.read({str(two)!r}, '{tmp_path}/runs'), ['{script}'], 2))"
    )
    status, error, log = signalled(tmp_path, signal.SIGINT, ["-c", code], 2)
    assert status == 1 and "the same command goes on" in error
    assert log == ["up", "up", "saved", "saved"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["two.py:sede"], 1, "run first: unknown config field config.sede; did you mean 'seed'?"),
        (["none.py"], 2, "no sweep file"),
        (["empty.py"], 2, "has no sweep()"),
        (["same.py"], 1, "names two runs 'a'"),
    ],
)
def test_bad_input_is_told_before_anything_starts(
    two, tmp_path, capsys, arguments, status, message
):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "same.py").write_text(
        "def sweep():\n    for _ in '12':\n        yield 'a', 'configs/demo.py', {}\n"
    )
    script = command(tmp_path, f"touch {tmp_path}/started")
    path = f"{tmp_path}/{arguments[0]}"
    assert sweep.main([path, f"--workdir={tmp_path}/runs", f"--submit={script}"]) == status
    assert message in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "started")


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ("def sweep(:", "", "failed: SyntaxError"),
        ("def sweep():\n    yield from ()", ":a", "failed: TypeError: sweep() takes 0 positional"),
        ("def sweep():\n    raise OSError('no')\n    yield", "", "failed: OSError: no"),
        (
            "def sweep():\n    return [('a', 'configs/demo.py')]",
            "",
            "failed: ValueError: not enough",
        ),
    ],
)
def test_what_a_sweep_file_raises_is_one_line(tmp_path, capsys, text, argument, message):
    (tmp_path / "one.py").write_text(text)
    assert sweep.main([f"{tmp_path}/one.py{argument}", f"--workdir={tmp_path}/runs"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_of_another_config_is_not_taken_for_finished(two, tmp_path, capsys):
    """As after a rate was changed: the table would mix both."""
    runs = sweep.read(str(two), f"{tmp_path}/runs")
    folder = Path(runs[0].workdir)
    steps(folder, str(runs[0].num_steps))
    (folder / "config.json").write_text(json.dumps(config_lib.to_json(runs[0].stages)))
    assert runs[0].state() == "finished"
    script = command(tmp_path, f"touch {tmp_path}/started")
    arguments = [str(two), f"--workdir={tmp_path}/runs", f"--submit={script}"]
    assert sweep.main([*arguments, "--", "--config.optim.weight_decay=0.5"]) == 1
    out, error = capsys.readouterr()
    assert out.splitlines() == ["first   of another config", "second  not started"]
    assert "1 of 2 runs cannot go on, the first: " in error
    assert "belongs to another config: config.optim.weight_decay is" in error
    assert "and 0.5 here" in error and not (tmp_path / "started").exists()


def test_what_a_run_starts_from_is_spelled_in_one_way(tmp_path):
    """A run is not of another config since its folder was typed otherwise."""
    (tmp_path / "one.py").write_text(CHAIN.replace("RUNS/", "{workdir}/"))
    spelled = ("runs/a", "./runs/a/", "runs/b/../a", f"{ROOT}/runs/a")
    assert {sweep.read(f"{tmp_path}/one.py", one)[1].source for one in spelled} == {"runs/a/tower"}
    elsewhere = sweep.read(f"{tmp_path}/one.py", f"{tmp_path}/runs")
    assert elsewhere[1].source == f"{tmp_path}/runs/tower"
    assert sweep.read(f"{tmp_path}/one.py", "gs://b/runs/")[1].source == "gs://b/runs/tower"


def test_storage_of_another_kind_is_one_line(two, capsys):
    assert sweep.main([str(two), "--workdir=s3://b/runs"]) == 1
    error = capsys.readouterr().err
    assert "cannot use s3://b/runs" in error and error.count("\n") == 1


def test_a_launch_command_that_is_not_there(two, tmp_path, capsys):
    assert sweep.main([str(two), f"--workdir={tmp_path}/runs", "--submit=launch/slrum.sh"]) == 1
    assert "launch/slrum.sh: No such file" in capsys.readouterr().err


def test_started_by_its_name_it_takes_the_python_that_was_set_up(tmp_path):
    """The system's own Python has none of the packages; -S stands for it."""
    (tmp_path / "launch").mkdir()
    copy = shutil.copy(ROOT / "launch" / "sweep.py", tmp_path / "launch")
    command = [sys.executable, "-I", "-S", copy, "a b.py", "--run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "run `make setup`" in done.stderr, done.stderr
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{copy}|a b.py|--run|"


def test_whoever_reads_the_list_may_stop_reading(tmp_path):
    sweep = shlex.quote(str(ROOT / "launch" / "sweep.py"))
    listing = f"configs/sweeps/connectors.py --workdir={tmp_path}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {sweep} {listing} | (exec <&-; sleep 0.1)"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
