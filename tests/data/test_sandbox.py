"""Whatever runs in the sandbox, the caller goes on: with a value, or with a reason in a line."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from alignvlm_jax.data import images, pdf, sandbox
from alignvlm_jax.data.sandbox import CallEnded
from alignvlm_jax.errors import UserError
from alignvlm_jax.ingest.formats import sandboxed
from alignvlm_jax.ingest.formats.base import Rejection
from alignvlm_jax.ingest.formats.pdf.document import Pdf
from tests.ingest.formats.pdf import make_pdf
from tests.ingest.formats.pdf.read_pdf import read_all, texts


def add(a, b):
    print("what a library says")
    return a + b


def burn():
    while True:
        pass


def fill():
    held = []
    while True:
        held.append(bytearray(b"x" * (1 << 24)))


def crash(path, times):
    """Crashes so many times in all, and then returns."""
    with open(path, "a") as file:
        file.write("x")
    if os.path.getsize(path) <= times:
        os.kill(os.getpid(), signal.SIGSEGV)
    return "alive"


def call_anew():
    """A call in a process of its own."""
    box = sandbox.Sandbox()
    try:
        return box.call(add, 2, 3)
    finally:
        box.close()


class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a)


def fail(kind):
    if kind == "user":
        raise UserError("no page")
    raise Odd(1, 2)


@pytest.fixture
def box():
    made = sandbox.Sandbox()
    yield made
    made.close()


def test_values_and_errors_come_back(box):
    assert box.call(add, 1, 2) == 3
    with pytest.raises(UserError, match=r"^no page$"):
        box.call(fail, "user")
    # What has no way back through a pipe is told all the same.
    with pytest.raises(RuntimeError, match=r"^Odd\(1\) \("):
        box.call(fail, "odd")
    assert box.call(add, "a", "b") == "ab"


@pytest.mark.parametrize(
    ("function", "limit", "value", "reason"),
    [
        (burn, "MAX_SECONDS", 0.3, "takes more than 0 s of CPU time"),
        (fill, "MAX_BYTES", 1 << 29, r"takes more than 0\.5 GiB of memory"),
        (time.sleep, "MAX_WAIT", 0.5, "takes more than 0 s$"),
    ],
)
def test_what_takes_too_much_is_ended_and_the_next_call_goes_on(
    box, monkeypatch, function, limit, value, reason
):
    assert box.call(add, 1, 1) == 2
    monkeypatch.setattr(sandbox, limit, value)
    began = time.monotonic()
    with pytest.raises(CallEnded, match=reason):
        box.call(function, *([60] if function is time.sleep else []))
    assert time.monotonic() - began < 30
    monkeypatch.undo()
    assert box.call(add, 1, 1) == 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_crash_is_tried_once_more(box, tmp_path, times):
    if times == 1:
        assert box.call(crash, str(tmp_path / "n"), 1) == "alive"
        return
    with pytest.raises(CallEnded, match=r"crashed \(SIGSEGV\)"):
        box.call(crash, str(tmp_path / "n"), 2)
    assert (tmp_path / "n").read_text() == "xx"
    assert box.call(add, 1, 1) == 2


def test_one_that_died_between_two_calls_costs_nothing(box):
    """As for the memory of others."""
    for _ in range(2):
        assert box.call(add, 1, 1) == 2
        box._process.kill()
        box._process.wait()
    assert box.call(add, 2, 2) == 4


def test_it_outlives_the_thread_that_needed_it_first(box):
    """A server may have a thread for each request: no call of another's ends with it."""
    first = threading.Thread(target=box.call, args=(add, 1, 1))
    first.start()
    first.join()
    process = box._process
    time.sleep(0.3)
    assert process.poll() is None
    assert box.call(add, 3, 3) == 6 and box._process is process


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")
def test_a_fork_starts_its_own():
    """Its parent's thread, which starts processes, is not in it."""
    sandbox._starter.start().kill()
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(call_anew).result(60) == 5


def test_no_process_at_all_is_told_to_who_waits(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(OSError, match="no/python"):
        sandbox._start()


def test_what_lies_in_the_folder_is_not_imported(box, tmp_path, monkeypatch):
    (tmp_path / "signal.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert box.call(add, 1, 1) == 2


def test_what_modules_print_is_no_answer_and_a_failed_start_is_an_error(tmp_path, monkeypatch):
    site = tmp_path / "sitecustomize.py"
    site.write_text("print('hello')")
    monkeypatch.syspath_prepend(tmp_path)
    box = sandbox.Sandbox()
    assert box.call(add, 1, 1) == 2
    box.close()
    site.write_text("import os; os._exit(5)")
    with pytest.raises(UserError, match=r"cannot be started \(status 5\)"):
        box.call(add, 1, 1)


def test_an_interrupt_ends_the_call_at_once(box):
    box.call(add, 1, 1)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        box.call(burn)
    assert time.monotonic() - began < 20
    assert box.call(add, 2, 2) == 4


PARENT = """
import sys
from tests.data import test_sandbox
from alignvlm_jax.data.sandbox import Sandbox
box = Sandbox()
box.call(test_sandbox.add, 1, 1)
print(box._process.pid, flush=True)
box.call(test_sandbox.burn)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends it on Linux alone")
def test_it_ends_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    pid = next(int(line) for line in parent.stdout if line.strip().isdigit())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    pytest.fail("it lives on")


def test_a_page_that_hangs_is_rejected_and_its_neighbours_stay(tmp_path, monkeypatch):
    good = make_pdf.pdf([make_pdf.text(20, 100, "good")])
    (tmp_path / "a.pdf").write_bytes(good)
    (tmp_path / "c.pdf").write_bytes(good)
    (tmp_path / "b.pdf").write_bytes(make_pdf.endless())
    sandboxed.sandbox.close()
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 2.0)
    first, bad, last = read_all(Pdf(), tmp_path)
    assert isinstance(bad, Rejection) and bad.id == "b-0001"
    assert bad.reason == "it takes more than 2 s of CPU time"
    assert texts(first) == texts(last) == ["good"]


def test_a_page_that_hangs_is_one_line_for_who_asks_about_it(tmp_path, monkeypatch):
    """As `generate`, `inspect` and `Assistant` read pages; Ctrl-C ends it, too."""
    (tmp_path / "a.pdf").write_bytes(make_pdf.pdf([make_pdf.text(20, 100, "good")]))
    (tmp_path / "b.pdf").write_bytes(make_pdf.endless())
    pdf._sandbox.close()
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        images.load_page(tmp_path / "b.pdf")
    assert time.monotonic() - began < 20
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 2.0)
    with pytest.raises(
        UserError, match=r"^cannot read .*b\.pdf, page 1: it takes more than 2 s of CPU"
    ):
        images.load_page(tmp_path / "b.pdf")
    assert images.load_page(tmp_path / "a.pdf").size == (417, 278)
