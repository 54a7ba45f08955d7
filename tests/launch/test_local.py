import os
import pathlib
import signal
import subprocess
import time

import pytest

from tests.launch.scripts import unbroken, words

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"


def run(*args, cwd=None, **env):
    return subprocess.run(
        [SCRIPT, *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **env},
    )


def test_dry_run_prints_one_command_a_process_and_starts_none(tmp_path):
    done = run("--dry_run", "3", "2", "train", "--workdir=x", cwd=tmp_path)
    lines = unbroken(done.stdout)
    assert done.returncode == 0 and len(lines) == 3
    for index, line in enumerate(lines):
        assert f"ALIGNVLM_PROCESS_ID={index} " in line
        assert "ALIGNVLM_NUM_PROCESSES=3" in line and "device_count=2" in line
        assert line.endswith("-m alignvlm_jax train --workdir=x")
    # One port for all, or they would wait for each other for ever.
    assert len({line.split("ALIGNVLM_COORDINATOR=")[1].split()[0] for line in lines}) == 1
    assert not list(tmp_path.iterdir())


def test_a_dry_run_is_readable_and_may_be_typed(tmp_path):
    """A flag a line, and quotes where a person would set them."""
    command = ["train", "--config=demo", "--workdir=runs/a b", "--config.name=it's", "$HOME [x]"]
    done = run("--dry_run", "1", "2", *command, cwd=tmp_path)
    shown = done.stdout.splitlines()
    assert "    --workdir='runs/a b' \\" in shown and "    --config=demo \\" in shown
    assert not any(line.count(" --") > 1 for line in shown)
    (line,) = unbroken(done.stdout)
    assert words(line)[-len(command) :] == command


def test_environment_reaches_every_process_and_stands_in_how_to_go_on(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$A|$XLA_FLAGS|$ALIGNVLM_LAUNCHER"\n')
    python.chmod(0o755)
    odd = 'b "c" $HOME'
    done = run(
        f"--env=A={odd}",
        "--env=XLA_FLAGS=--more=1",
        "2",
        "3",
        "train",
        cwd=tmp_path,
        PYTHON=str(python),
    )
    assert done.returncode == 0, done.stderr
    for index in range(2):
        said, flags, launcher = (
            (tmp_path / f"runs/local/process-{index}.log").read_text().strip().split("|")
        )
        # Devices are asked for by the same variable.
        assert said == odd and flags == "--xla_force_host_platform_device_count=3 --more=1"
        again = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {launcher}"], capture_output=True, text=True
        ).stdout
        assert again.split("\0")[1:-1] == [f"--env=A={odd}", "--env=XLA_FLAGS=--more=1", "2", "3"]


@pytest.mark.parametrize("args", [(), ("2",), ("2", "x", "train"), ("0", "1", "train")])
def test_wrong_usage_is_status_2_and_says_how(args, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2 and "NUM_PROCESSES DEVICES_EACH COMMAND" in done.stderr


@pytest.mark.parametrize("flag", ["--env=A", "--env=1A=b", "--evn=A=b"])
def test_a_flag_that_is_none_is_named(flag, tmp_path):
    done = run(flag, "1", "1", "train", cwd=tmp_path)
    assert (
        done.returncode == 2
        and f"unknown flag {flag}" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_a_failing_process_ends_the_others_and_its_status_is_returned(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$ALIGNVLM_PROCESS_ID" = 1 ] && { echo broken >&2; exit 7; }\nexec sleep 50\n'
    )
    python.chmod(0o755)
    done = run("2", "1", "train", cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 7
    assert "status 7" in done.stderr and "broken" in done.stderr


def test_a_process_that_hears_no_signal_is_killed(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\n[ "$ALIGNVLM_PROCESS_ID" = 1 ] && exit 7\ntrap "" TERM\nfor i in $(seq 100); '
        "do sleep 0.1; done\n"
    )
    python.chmod(0o755)
    began = time.monotonic()
    assert run("2", "1", "train", cwd=tmp_path, PYTHON=str(python), GRACE="1").returncode == 7
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("number", "theirs", "status"),
    [
        (signal.SIGINT, 1, 1),
        (signal.SIGTERM, 1, 1),
        (signal.SIGINT, 143, 130),
        (signal.SIGTERM, 143, 143),
    ],
)
def test_ctrl_c_reaches_every_process_once_and_is_waited_for(tmp_path, number, theirs, status):
    """As a terminal does it: the signal goes to the launcher's whole process group."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ntrap 'echo signal; stop=1' INT TERM\necho ready\nwhile [ -z \"$stop\" ]; do "
        "sleep 0.1; done\n"
        f"sleep 0.7\necho saved\nexit {theirs}\n"
    )
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    command = [SCRIPT, "2", "1", "train"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as launcher:
        logs = [tmp_path / f"runs/local/process-{i}.log" for i in range(2)]
        try:
            while not all(log.exists() and log.read_text() for log in logs):
                time.sleep(0.02)
            os.killpg(launcher.pid, number)
            assert launcher.wait(30) == status
        finally:
            launcher.kill()
    assert [log.read_text().split() for log in logs] == [["ready", "signal", "saved"]] * 2


def test_every_process_gets_its_own_log_and_all_must_succeed(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "process $ALIGNVLM_PROCESS_ID runs $*"\n')
    python.chmod(0o755)
    done = run("2", "1", "train", cwd=tmp_path, PYTHON=str(python))
    assert (
        done.returncode == 0
        and done.stderr == ""
        and "process 0 runs -m alignvlm_jax train" in done.stdout
    )
    assert "process 1 runs" not in done.stdout
    assert "process 1 runs" in (tmp_path / "runs/local/process-1.log").read_text()
