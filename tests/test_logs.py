"""A host's log holds what one asks first about a process that failed; the terminal only our own
lines."""

import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
from absl import logging as absl_logging

import alignvlm_jax
from alignvlm_jax import logs
from alignvlm_jax.errors import UserError
from alignvlm_jax.logs import HostLog


def host_log(folder: Path, **changes) -> HostLog:
    return HostLog(folder, **({"process": 1, "num_processes": 4, "commit": "abc123"} | changes))


def text_of(folder: Path, process: int = 1) -> str:
    return (folder / "logs" / f"host-{process}.log").read_text()


@pytest.fixture
def no_handlers(monkeypatch):
    """The root logger as in a program of its own: pytest has handlers there."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def test_the_first_lines_say_who_where_and_with_what(folder, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_other=2")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    with host_log(folder):
        pass
    text = text_of(folder)
    for part in (
        f"process 1 of 4: host {os.uname().nodename}, pid {os.getpid()}",
        f"versions: alignvlm_jax {alignvlm_jax.__version__}, python {sys.version.split()[0]}, jax 0.",
        "orbax-checkpoint 0.",
        "commit: abc123",
        "command: ",
        "environment: XLA_FLAGS=--xla_some_flag=1",
        "environment: LIBTPU_INIT_ARGS=--xla_other=2",
    ):
        assert part in text, part
    assert "hidden" not in text
    assert "libtpu" not in text.split("versions: ")[1].split("\n")[0] or "libtpu 0." in text
    assert text.endswith("ended\n")


def test_everything_goes_to_the_file_and_nothing_to_the_terminal(tmp_path, capfd, no_handlers):
    with logs.collected(debug=False):
        absl_logging.info("before the file %d", 1)
        with host_log(tmp_path):
            absl_logging.info("ours")
            logging.getLogger("absl").warning("of orbax")
            logging.getLogger("jax._src.xla_bridge").warning("of jax")
            logging.getLogger("other.library").error("of another")
            warnings.warn(f"a {'donated'} buffer", UserWarning, stacklevel=1)
    text = text_of(tmp_path)
    for part in (
        "before the file 1",
        "ours",
        "of orbax",
        "of jax",
        "of another",
        "UserWarning: a donated buffer",
    ):
        assert text.count(part) == 1, part
    assert capfd.readouterr() == ("", "")


def test_without_a_file_warnings_are_told_but_not_what_orbax_says_of_what_we_tell(
    capfd, no_handlers
):
    with logs.collected(debug=False):
        absl_logging.info("chatter")
        absl_logging._absl_logger.handle(
            record("absl", "/lib/orbax/checkpoint.py", "Traceback of orbax")
        )
        absl_logging._absl_logger.handle(
            record("absl", str(logs.PACKAGE / "x.py"), "a warning of ours")
        )
        logging.getLogger("jax").warning("of jax")
    assert capfd.readouterr() == ("", "a warning of ours\nof jax\n")


def record(name: str, path: str, message: str) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, path, 1, message, (), None)


def test_debugging_shows_everything_on_the_terminal(tmp_path, capfd, no_handlers):
    with logs.collected(debug=True), host_log(tmp_path):
        absl_logging.info("chatter")
        absl_logging._absl_logger.handle(record("absl", "/lib/orbax/checkpoint.py", "of orbax"))
    out, err = capfd.readouterr()
    assert out == "" and "chatter" in err and "of orbax" in err
    assert "chatter" in text_of(tmp_path)


@pytest.mark.parametrize(
    "error", [UserError("batch 3 does not divide"), PermissionError(13, "Permission denied", "x")]
)
def test_an_error_leaves_its_traceback(folder, error):
    def a_function_that_fails() -> None:
        raise error

    with pytest.raises(type(error)), host_log(folder):
        a_function_that_fails()
    text = text_of(folder)
    assert f"ended by {type(error).__name__}: {error}" in text
    assert "in a_function_that_fails" in text


def test_the_next_process_appends(folder):
    for commit in ("first", "second"):
        with host_log(folder, commit=commit):
            pass
    text = text_of(folder)
    assert text.index("commit: first") < text.index("commit: second")
    assert text.count("ended\n") == 2


def test_logging_is_afterwards_as_before(tmp_path):
    root = logging.getLogger()
    before = list(root.handlers), root.level, warnings.showwarning
    with logs.collected(debug=False), host_log(tmp_path):
        assert root.handlers != before[0]
    assert (list(root.handlers), root.level, warnings.showwarning) == before


def test_what_is_new_reaches_a_bucket_at_intervals(bucket_folder):
    with host_log(bucket_folder, ship_seconds=0.2):
        for i in range(3):
            absl_logging.info("line %d", i)
            deadline = time.monotonic() + 10
            while f"line {i}" not in read(bucket_folder) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert f"line {i}" in read(bucket_folder)
    text = text_of(bucket_folder)
    assert [text.count(f"line {i}\n") for i in range(3)] == [1, 1, 1] and text.endswith("ended\n")


def read(folder: Path) -> str:
    try:
        return text_of(folder)
    except FileNotFoundError:
        return ""


def test_a_bucket_that_fails_for_a_while_gets_all_later(bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr("alignvlm_jax.storage.bucket_requests._patience", 0.1)
    with host_log(bucket_folder, ship_seconds=0.1):
        absl_logging.info("one")
        with bucket.faulty(error_rate=1.0):
            time.sleep(1)
            absl_logging.info("two")
        time.sleep(0.5)
        absl_logging.info("three")
    text = text_of(bucket_folder)
    assert [text.count(f"] {word}\n") for word in ("one", "two", "three")] == [1, 1, 1]
    assert text.count("cannot write gs://") >= 1


def test_a_bucket_that_answers_no_more_holds_nobody_up(bucket, bucket_folder, monkeypatch):
    monkeypatch.setattr(logs, "LAST_SECONDS", 0.5)
    with host_log(bucket_folder, ship_seconds=60):
        began = time.monotonic()
        bucket.faults.latency = 3
    try:
        assert time.monotonic() - began < 2
    finally:
        bucket.faults.latency = 0
        time.sleep(3)


CRASH = """
    import faulthandler, os, signal, sys, time
    from pathlib import Path
    from alignvlm_jax import logs

    def the_function_at_work():
        print("ready", flush=True)
        {work}

    with logs.HostLog(Path(sys.argv[1]), process=1, num_processes=4, commit="x"):
        the_function_at_work()
"""


def start(folder: Path, work: str) -> subprocess.Popen:
    program = textwrap.dedent(CRASH.replace("{work}", work))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], text=True, stdout=subprocess.PIPE
    )


def test_a_crash_leaves_the_stacks(tmp_path):
    with start(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)") as process:
        assert process.wait(30) == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in text_of(tmp_path)
    assert "in the_function_at_work" in text_of(tmp_path)


def test_stacks_can_be_asked_for(tmp_path):
    with start(tmp_path, "time.sleep(3)") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0
    assert "in the_function_at_work" in text_of(tmp_path)


@pytest.mark.parametrize(
    ("argv", "value", "debugging"),
    [([], "", False), (["train", "--debug"], "", True), ([], "1", True), ([], "0", False)],
)
def test_how_one_asks_for_tracebacks(monkeypatch, argv, value, debugging):
    monkeypatch.setenv("ALIGNVLM_DEBUG", value)
    assert logs.is_debugging(argv) is debugging


def test_a_full_disk_does_not_take_the_place_of_the_error(tmp_path, capfd):
    """Nor does each line of the log have a traceback."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(RuntimeError, match="checkpoint 7"):
        try:
            with logs.HostLog(tmp_path, process=0, num_processes=1, commit="x") as log:
                resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size, limits[1]))
                for _ in range(3):
                    absl_logging.warning("a line")
                raise RuntimeError("could not write checkpoint 7")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capfd.readouterr().err
    assert said.count("cannot write the log") == 1 and "Logging error" not in said
