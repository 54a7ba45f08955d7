"""Which Python: the one that CI finds beside the default one, and what make says of a venv of
another."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def executable(path: pathlib.Path, script: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def python_of(version: str) -> str:
    """A script that runs the checks of `newest_python` as that version would."""
    return (
        f'exec {sys.executable} -c "import sys; sys.version_info = '
        f'({version.replace(".", ", ")}, 0); $2"'
    )


def newest(folder: pathlib.Path, default: str = "3.11") -> tuple[str, str]:
    executable(folder / "bin/python3", python_of(default))
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "PYENV_ROOT": str(folder / "pyenv")}
    done = subprocess.run(
        [ROOT / ".ci/newest_python"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


@pytest.fixture
def shims(tmp_path):
    """Names on PATH that start nothing, also where the machine that the test runs on has such a
    Python."""
    for version in ("3.12", "3.13"):
        executable(
            tmp_path / f"bin/python{version}", "echo 'pyenv: command not found' >&2; exit 127"
        )
    return tmp_path


def test_none_is_said_in_a_line(shims):
    assert newest(shims) == (
        "",
        "tests run on the default Python, 3.11, alone: of 3.13 3.12 no other starts here\n",
    )


def test_a_shim_that_starts_nothing_is_passed_over(shims):
    executable(shims / "bin/python3.12", python_of("3.12"))
    assert newest(shims) == ("python3.12", "")


def test_the_newest_of_pyenv_is_found_behind_its_shim(shims):
    for patch in ("3.12.4", "3.13.2", "3.13.10"):
        minor = patch.rpartition(".")[0]
        executable(shims / f"pyenv/versions/{patch}/bin/python{minor}", python_of(minor))
    assert newest(shims)[0] == str(shims / "pyenv/versions/3.13.10/bin/python3.13")
    assert newest(shims, default="3.13")[0] == str(shims / "pyenv/versions/3.12.4/bin/python3.12")


def make_python(python: str, folder: pathlib.Path):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS")
    }
    command = ["make", "--silent", "python", f"PYTHON={python}", f"VENV={folder}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("made_with", [HERE, None])
def test_make_takes_a_venv_of_the_python_asked_for_and_a_new_one(tmp_path, made_with):
    if made_with:
        executable(tmp_path / "bin/python", f"echo {made_with}")
    done = make_python(sys.executable, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_make_refuses_a_venv_of_another_python(tmp_path):
    executable(tmp_path / "bin/python", "echo 3.9")
    done = make_python(sys.executable, tmp_path)
    assert done.returncode == 2
    assert (
        f"{tmp_path} is of Python 3.9, and PYTHON={sys.executable} is {HERE}: add VENV=.venv-{HERE}"
        in done.stderr
    )
