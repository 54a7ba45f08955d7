import errno
import os
import pathlib
import signal
import subprocess
import sys
import types

import jax
import pytest

from alignvlm_jax import __main__ as main_lib
from alignvlm_jax.errors import StoppedError, TryAgainError, UsageError, UserError

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch):
    """Puts a function in the place of `train`."""

    def install(function) -> None:
        module = type(sys)("alignvlm_jax.commands.train")
        module.main = function
        monkeypatch.setitem(sys.modules, "alignvlm_jax.commands.train", module)

    return install


def fail_with(error: BaseException):
    def main(argv: list[str]) -> None:
        raise error

    return main


def test_arguments_are_handed_on_and_success_is_0(command):
    seen = []
    command(seen.extend)
    assert main_lib.main(["train", "--workdir=x", "y"]) == 0
    assert seen == ["--workdir=x", "y"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("batch 3 does not divide"), "batch 3 does not divide"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/mine"),
            "runs/mine: Permission denied",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_1(command, capsys, error, message):
    command(fail_with(error))
    assert main_lib.main(["train"]) == 1
    assert capsys.readouterr().err == f"alignvlm_jax: error: {message}\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("a"), 2),
        (TryAgainError("a"), 75),
        (StoppedError("a"), 143),
        (StoppedError("a", signal.SIGINT), 130),
        (TimeoutError("a"), 75),
        (ConnectionResetError("a"), 75),
        (OSError("a"), 1),
    ],
)
def test_what_launchers_start_again_has_a_status_of_its_own(command, capsys, error, status):
    command(fail_with(error))
    assert main_lib.main(["train"]) == status
    # To stop when told to is no error.
    kind = "" if isinstance(error, StoppedError) else "error: "
    assert capsys.readouterr().err == f"alignvlm_jax: {kind}a\n"


@pytest.mark.parametrize(
    "error", [UserError("ours"), PermissionError(errno.EACCES, "Permission denied", "runs/mine")]
)
@pytest.mark.parametrize(("flags", "value"), [(["--debug"], ""), ([], "1")])
def test_debugging_shows_the_traceback_before_the_line(
    command, capsys, monkeypatch, error, flags, value
):
    seen = []

    def a_function_that_fails(argv: list[str]) -> None:
        seen.extend(argv)
        raise error

    command(a_function_that_fails)
    monkeypatch.setenv("ALIGNVLM_DEBUG", value)
    assert main_lib.main(["train", *flags, "--workdir=x"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any("in a_function_that_fails" in line for line in lines)
    assert lines[-1].startswith("alignvlm_jax: error: ")
    assert seen == ["--workdir=x"]


def test_ctrl_c_has_the_status_that_shells_expect(command, capsys):
    command(fail_with(KeyboardInterrupt()))
    assert main_lib.main(["train"]) == 130
    assert capsys.readouterr().err == "alignvlm_jax: interrupted\n"


def test_a_fault_of_ours_is_not_hidden(command):
    command(fail_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main_lib.main(["train"])


def test_whoever_reads_may_stop_reading():
    """Not where another pipe broke: work would be lost without a word."""
    program = f"{sys.executable} -m alignvlm_jax config --config=configs/demo.py"
    command = ["bash", "-c", f"{program} | head -n 1; echo ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines()[0].startswith("5 stages") and not done.stderr
    assert done.stdout.splitlines()[1] in ("0", "141")  # All may have been written by then.
    program = f"{sys.executable} -m alignvlm_jax --version"
    for buffered in ("", "1"):
        line = f"{program} | (exec <&-; sleep 1); echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, cwd=REPOSITORY, check=True,
            env=os.environ | {"PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
        assert (done.stdout.split(), done.stderr) == (["141"], "")


def test_another_broken_pipe_is_told(command, capsys):
    command(fail_with(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert main_lib.main(["train"]) == 75
    assert "Broken pipe" in capsys.readouterr().err


def test_other_runtime_errors_stay_what_they_are(command, monkeypatch):
    """Also where there is no device: that is not what happened."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    command(fail_with(RuntimeError("can't start new thread")))
    with pytest.raises(RuntimeError, match="new thread"):
        main_lib.main(["train"])


def test_no_memory_is_one_line(command, capsys):
    command(
        fail_with(
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"
            )
        )
    )
    assert main_lib.main(["train"]) == 70
    told = capsys.readouterr().err
    assert told.endswith(
        "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. more\n"
    )
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (AssertionError(), 1, "JAX finds no device for JAX_PLATFORMS=cuda; requirements-gpu.txt"),
        (RuntimeError("'cdua' is not in the list of known backends"), 1, "known backends); req"),
        (RuntimeError("The TPU is already in use by process 7\nmore"), 75, "by process 7 more)"),
    ],
)
def test_no_device_is_one_line(command, capsys, monkeypatch, error, status, message):
    """jax says so at the first use of a device, wherever that is, from one file of its own."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    namespace = {"error": error}
    where = "site-packages/jax/_src/xla_bridge.py"
    exec(compile("def backends(argv):\n    raise error", where, "exec"), namespace)
    command(namespace["backends"])
    assert main_lib.main(["train"]) == status
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_an_unknown_command_names_the_nearest_and_is_wrong_usage(capsys):
    assert main_lib.main(["trian"]) == 2
    assert (
        capsys.readouterr().err
        == "alignvlm_jax: error: unknown command 'trian'; did you mean 'train'?\n"
    )


def test_only_some_commands_run_as_several_processes(command, monkeypatch, capsys):
    command(lambda argv: None)
    monkeypatch.setenv("ALIGNVLM_NUM_PROCESSES", "2")
    assert main_lib.main(["train"]) == 0
    assert main_lib.main(["generate", "--checkpoint=x"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "generate runs as one process" in errors
    assert "only train, evaluate, inspect --analysis join several" in errors


@pytest.mark.parametrize(
    ("name", "lines"), [("train", 1), ("convert", 1), ("prepare", 0), ("plan", 0)]
)
def test_flags_of_the_tpu_are_set_before_a_command_that_computes(name, lines, monkeypatch, capsys):
    set_by_then = []
    fake = types.SimpleNamespace(
        main=lambda argv: set_by_then.append(os.environ["LIBTPU_INIT_ARGS"])
    )
    monkeypatch.setitem(sys.modules, f"alignvlm_jax.commands.{name}", fake)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-128")
    assert main_lib.main([name]) == 0
    assert capsys.readouterr().err.count("XLA flags: LIBTPU_INIT_ARGS gets --xla") == lines
    assert ("--xla_tpu_overlap_compute_collective_tc=true" in set_by_then[0]) == lines


def test_on_every_host_of_a_slice_report_would_write_the_same_files(command, monkeypatch, capsys):
    command(lambda argv: None)
    monkeypatch.setenv("ALIGNVLM_AUTO_DISTRIBUTED", "1")
    assert main_lib.main(["train"]) == 0
    assert main_lib.main(["report", "--workdir=x"]) == 1
    assert (
        "report runs as one process, and ALIGNVLM_AUTO_DISTRIBUTED is set"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "status"), [("UserError('ours')", 1), ("ZeroDivisionError('a fault')", 70)]
)
def test_a_failing_process_waits_for_nobody(tmp_path, error, status):
    """Exit hooks, such as the barrier of jax.distributed, would wait for processes that wait for
    this one."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, runpy, sys, types\n"
        "from alignvlm_jax.errors import UserError\n"
        f"def fail(argv): raise {error}\n"
        "sys.modules['alignvlm_jax.commands.train'] = types.SimpleNamespace(main=fail)\n"
        "atexit.register(print, 'waited', file=sys.stderr)\n"
        "sys.argv[1:] = ['train']\n"
        "runpy.run_module('alignvlm_jax', run_name='__main__')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == status
    assert "waited" not in done.stderr and error.split("'")[1] in done.stderr


def test_no_command_is_wrong_usage_and_help_is_not(capsys):
    assert main_lib.main([]) == 2
    assert main_lib.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in main_lib.COMMANDS)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_a_python_without_the_packages_is_told_of_the_right_one(argv):
    """-S: without site-packages, as the system's Python has none of ours."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "alignvlm_jax", *argv],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "absl is not installed in this Python" in done.stderr
    assert "source .venv/bin/activate" in done.stderr


def test_a_package_that_only_a_command_needs_is_told_too(command, capsys):
    command(fail_with(ModuleNotFoundError("No module named 'jax'", name="jax")))
    assert main_lib.main(["train"]) == 1
    assert capsys.readouterr().err.startswith("alignvlm_jax: error: jax is not installed in this")
    # One of our own modules that is missing is a fault of ours.
    command(fail_with(ModuleNotFoundError("none", name="alignvlm_jax.nothing")))
    with pytest.raises(ModuleNotFoundError):
        main_lib.main(["train"])
