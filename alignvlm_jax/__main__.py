"""The command line: `alignvlm COMMAND ...`, or `python -m alignvlm_jax COMMAND ...`.

Exit status: 0 done; 1 wrong input (one line on stderr), which would only fail again; 2 wrong usage;
130 Ctrl-C (SIGINT) at a single process.
The launch scripts restart a command with any other status: 70 an unforeseen exception; 75 stalled,
another host lost or late, or a storage that does not answer; 143 told to stop, and saved.
"""

import contextlib
import importlib
import os
import select
import sys
import traceback
from types import ModuleType
from typing import NoReturn

PACKAGE = "alignvlm_jax"
INTERRUPTED_STATUS = 130
UNREAD_STATUS = 141
"""As of a process that SIGPIPE ended."""
FAULT_STATUS = 70
"""Of what nobody expected (EX_SOFTWARE of sysexits.h); launchers start again, and count."""


def _not_installed(err: ModuleNotFoundError) -> str:
    """Returns in a line what this Python lacks; raises the error where that is a module of ours."""
    # Told as such, a module of ours that is missing would be looked for in the wrong place.
    if err.name is None or err.name.partition(".")[0] == PACKAGE:
        raise err
    return (
        f"{err.name} is not installed in this Python, {sys.executable}: source .venv/bin/activate, "
        "or make setup"
    )


try:
    from alignvlm_jax import __version__, logs, storage
    from alignvlm_jax.commands import usage
    from alignvlm_jax.errors import (
        TRY_AGAIN_STATUS,
        StoppedError,
        TryAgainError,
        UsageError,
        UserError,
        nearest,
        one_line,
    )
    from alignvlm_jax.parallel import xla_flags
    from alignvlm_jax.storage import faults
    from alignvlm_jax.storage.faults import Kind
except ModuleNotFoundError as _err:
    # Most likely the system's Python, and not that of .venv: nothing of ours can be used here.
    sys.exit(f"{PACKAGE}: error: {_not_installed(_err)}")

COMMANDS = {
    "prepare": "makes training shards of data sets, of your own documents, or of rendered ones",
    "convert": "makes a checkpoint to start from out of published weights, and exports one back",
    "config": "shows what the stages of a config come to, each field with its unit and meaning",
    "plan": "says what a stage needs on a TPU slice, without one: memory, FLOPs, collectives, days",
    "inspect": "shows what a prepared folder holds, the rows that a model would get, and analyses "
    "a trained one",
    "train": "trains the stages of a config, or goes on with them",
    "evaluate": "asks a trained model the evaluation questions and scores its answers",
    "generate": "answers a question about an image or a PDF page",
    "serve": "answers questions about pages over HTTP, as OpenAI's chat API, with a page to try it",
    "report": "writes report.html of a run",
    "compare": "measures runs of several connectors or settings and seeds, and writes their "
    "tables and pictures",
}

JOINING = {"train": "", "evaluate": "", "inspect": "--analysis"}
"""Commands that several processes can run together, with the flag that this needs ("" for none)."""

COMPUTING = (*JOINING, "convert", "generate", "serve", "compare")
"""Commands that compile for this machine's devices."""


def main(argv: list[str]) -> int:
    """Runs a command and returns its exit status.

    Args:
      argv: the command's name and its arguments.
    """
    debug = logs.is_debugging(argv)
    argv = [argument for argument in argv if argument != "--debug"]
    with logs.collected(debug):
        return _run(argv, debug)


def _run(argv: list[str], debug: bool) -> int:
    """Runs a command, and prints an error that it raises as a line on stderr."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {usage.program()} COMMAND [--help] [--debug] ... | --version\n")
        print("\n".join(f"  {name:10}{help_text}" for name, help_text in COMMANDS.items()))
        print(
            "\n--debug, or ALIGNVLM_DEBUG=1: the traceback of an error, and all messages of "
            "libraries on the terminal"
        )
        return 0 if argv else 2
    if argv[0] == "--version":
        print(_version())
        return 0
    if argv[0] not in COMMANDS:
        print(
            f"{_prefix()}: error: unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    if not _joins(argv) and (name := usage.several_processes()):
        joining = ", ".join(f"{command} {flag}".strip() for command, flag in JOINING.items())
        return _fail(
            f"{argv[0]} runs as one process, and {name} is set: only {joining} join several"
        )
    # Before the command is imported: XLA reads its flags once, when the first device is made.
    if argv[0] in COMPUTING and (line := xla_flags.apply_preset()):
        print(line, file=sys.stderr, flush=True)
    try:
        # Imported only now: a command that needs no JAX should not wait for it.
        importlib.import_module(f"alignvlm_jax.commands.{argv[0]}").main(argv[1:])
    except UsageError as err:
        return _fail(str(err), status=2)
    except TryAgainError as err:
        return _fail(str(err), status=TRY_AGAIN_STATUS)
    except StoppedError as err:
        # As it was asked to: no error.
        return _fail(str(err), status=err.status, kind="")
    except UserError as err:
        _show_traceback(debug)
        return _fail(str(err))
    except OSError as err:
        if _nobody_reads(err):
            return _unread()
        _show_traceback(debug)
        message = f"{err.filename}: {err.strerror}" if err.filename and err.strerror else str(err)
        return _fail(message, status=TRY_AGAIN_STATUS if faults.kind_of(err) is Kind.PASSING else 1)
    except ModuleNotFoundError as err:
        message = _not_installed(err)
        _show_traceback(debug)
        return _fail(message)
    except (RuntimeError, AssertionError) as err:
        if str(err).startswith("RESOURCE_EXHAUSTED") and type(err).__module__.startswith("jax"):
            _show_traceback(debug)
            return _fail(f"out of memory: {one_line(err)}", FAULT_STATUS)
        # jax says either where it finds no device, in words of its own.
        if not (problem := _no_device(err)):
            raise
        _show_traceback(debug)
        return _fail(*problem)
    except KeyboardInterrupt:
        # Nothing to go on with. A command that has saved raises StoppedError.
        return _fail("interrupted", status=INTERRUPTED_STATUS, kind="")
    return 0


def _unread() -> int:
    """Tells the other processes that nobody reads what is printed, and returns the exit status."""
    if distributed := _distributed():
        return distributed.fail("nobody reads what is printed", UNREAD_STATUS)
    return UNREAD_STATUS


def _nobody_reads(err: BaseException) -> bool:
    """Whether an exception says that who read what is printed has seen enough, as `head`; then
    nothing is printed any more, or Python would say so at its exit. Other pipes may break, too."""
    if not isinstance(err, BrokenPipeError):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout, select.POLLOUT)
    except (OSError, ValueError):  # No file at all: of a program that calls this one.
        return False
    if is_closed := any(events & select.POLLERR for _, events in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _no_device(err: BaseException) -> tuple[str, int] | None:
    """Returns that JAX finds no device and what to do, with the exit status, where that is what an
    exception is; else None."""
    # Not by asking JAX again, which would start a backend that another process may hold.
    *_, last = traceback.extract_tb(err.__traceback__)
    if not last.filename.endswith("xla_bridge.py"):
        return None
    message = (
        f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        f"{f' ({one_line(err)})' if str(err) else ''}; requirements-gpu.txt and "
        "requirements-tpu.txt install what accelerators need, and JAX_PLATFORMS=cpu does without"
    )
    # A platform whose plugin is not there is an assertion without words. A device that is there may
    # be free again when the process that has it is gone.
    is_unknown = isinstance(err, AssertionError) or "known backends" in str(err)
    return message, 1 if is_unknown else TRY_AGAIN_STATUS


def _version() -> str:
    """Returns the version of the package, with the commit where it is known."""
    from alignvlm_jax.train import commit

    known = commit.git_hash()
    return f"alignvlm_jax {__version__}{'' if known == 'unknown' else f', commit {known}'}"


def _prefix() -> str:
    """Returns the word before a message: what was typed, without the interpreter."""
    return usage.program().split()[-1]


def _show_traceback(debug: bool) -> None:
    """Prints the traceback of the exception at hand with --debug; the host's log always has it."""
    if debug:
        traceback.print_exc()


def _joins(argv: list[str]) -> bool:
    """Whether several processes run this command together."""
    flag = JOINING.get(argv[0])
    # Every argument begins with "", the flag of commands that need none.
    return flag is not None and any(argument.startswith(flag) for argument in argv)


def _fail(message: str, status: int = 1, kind: str = "error: ") -> int:
    """Prints why the command ends, tells the other processes, and returns the exit status."""
    # `say` raises nothing if stderr cannot be written: the others still wait to be told.
    logs.say(f"{_prefix()}: {kind}{message}")
    if distributed := _distributed():
        return distributed.fail(message, status)
    return status


def leave_with(status: int) -> NoReturn:
    """Ends the process with an exit status; if it failed, at once and without exit hooks."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as err:
        if _nobody_reads(err):
            status = status or UNREAD_STATUS
    storage.close_all()
    if status in (0, 2):
        if distributed := _distributed():
            distributed.leave()
        sys.exit(status)
    # An orderly exit would wait for threads that still write, and exit hooks of libraries, which
    # fail for the same reason, would add their tracebacks to the one line. Of several processes,
    # the failed one would wait for the others, and these, in the midst of a step, for it.
    os._exit(status)


def _distributed() -> ModuleType | None:
    """Returns the module `parallel.distributed` if a command has imported it, else None."""
    # Not imported here: a command that has joined no processes need not wait for JAX.
    return sys.modules.get("alignvlm_jax.parallel.distributed")


def run() -> NoReturn:
    """Runs the command of the command line, and ends the process with its exit status."""
    try:
        status = main(sys.argv[1:])
    except Exception as err:
        if _nobody_reads(err):
            leave_with(_unread())
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()
        status = _fail(f"unforeseen: {type(err).__name__}: {err}", FAULT_STATUS)
    leave_with(status)


if __name__ == "__main__":
    run()
