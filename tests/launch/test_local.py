import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"


def run(*args, cwd=None, **env):
    return subprocess.run(
        [SCRIPT, *args], capture_output=True, text=True, timeout=60, cwd=cwd, env={"PATH": "/usr/bin:/bin", **env}
    )


def test_dry_run_prints_one_command_a_process_and_starts_none(tmp_path):
    done = run("--dry_run", "3", "2", "train", "--workdir=x", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3
    for index, line in enumerate(lines):
        assert f"ALIGNVLM_PROCESS_ID={index} " in line
        assert "ALIGNVLM_NUM_PROCESSES=3" in line and "device_count=2" in line
        assert line.endswith("-m alignvlm_jax train --workdir=x")
    # One port for all, or they would wait for each other for ever.
    assert len({line.split("ALIGNVLM_COORDINATOR=")[1].split()[0] for line in lines}) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [(), ("2",), ("2", "x", "train"), ("0", "1", "train")])
def test_wrong_usage_is_status_2_and_says_how(args, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2 and "NUM_PROCESSES DEVICES_EACH COMMAND" in done.stderr


def test_a_failing_process_ends_the_others_and_its_status_is_returned(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$ALIGNVLM_PROCESS_ID" = 1 ] && { echo broken >&2; exit 7; }\nexec sleep 50\n')
    python.chmod(0o755)
    done = run("2", "1", "train", cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 7
    assert "status 7" in done.stderr and "broken" in done.stderr


def test_every_process_gets_its_own_log_and_all_must_succeed(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "process $ALIGNVLM_PROCESS_ID runs $*"\n')
    python.chmod(0o755)
    done = run("2", "1", "train", cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 0 and "process 0 runs -m alignvlm_jax train" in done.stdout
    assert "process 1 runs" not in done.stdout
    assert "process 1 runs" in (tmp_path / "runs/local/process-1.log").read_text()
