"""`python -m alignvlm_jax COMMAND ...`.

Exit status: 0 done; 1 wrong input (one line on stderr), which would only fail again; 2 wrong usage.
The launch scripts start again what ends otherwise: 70 an exception that nobody expected; 75
stalled, another host lost or late, a storage that does not answer; 143 told to stop, and saved.
"""

import contextlib
import importlib
import os
import sys
import traceback
from types import ModuleType
from typing import NoReturn

from alignvlm_jax import logs, storage
from alignvlm_jax.errors import (
    TRY_AGAIN_STATUS,
    StoppedError,
    TryAgainError,
    UsageError,
    UserError,
    nearest,
)
from alignvlm_jax.parallel import xla_flags
from alignvlm_jax.storage import faults
from alignvlm_jax.storage.faults import Kind

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
    "report": "writes report.html of a run",
    "compare": "measures runs of several connectors or settings and seeds, and writes their "
    "tables and pictures",
}

JOINING = {"train": "", "evaluate": "", "inspect": "--analysis"}
"""Commands that several processes run as one, and the flag without which they do not."""

COMPUTING = (*JOINING, "convert", "generate", "compare")
"""Commands that compile for this machine's devices."""


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    debug = logs.is_debugging(argv)
    argv = [argument for argument in argv if argument != "--debug"]
    with logs.collected(debug):
        return _run(argv, debug)


def _run(argv: list[str], debug: bool) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m alignvlm_jax COMMAND [--help] [--debug] ...\n")
        print("\n".join(f"  {name:10}{help_text}" for name, help_text in COMMANDS.items()))
        print(
            "\n--debug, or ALIGNVLM_DEBUG=1: the traceback of an error, and all messages of "
            "libraries on the terminal"
        )
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(
            f"alignvlm_jax: error: unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    if not _joins(argv) and (name := _several_processes()):
        joining = ", ".join(f"{command} {flag}".strip() for command, flag in JOINING.items())
        return _fail(
            f"{argv[0]} runs as one process, and {name} is set: only {joining} join several"
        )
    if argv[0] in COMPUTING and (line := xla_flags.apply_preset()):
        print(line, file=sys.stderr, flush=True)
    try:
        # Imported late: `--help` of a command that needs no jax should not wait for it.
        importlib.import_module(f"alignvlm_jax.commands.{argv[0]}").main(argv[1:])
    except UsageError as err:
        return _fail(str(err), status=2)
    except TryAgainError as err:
        return _fail(str(err), status=TRY_AGAIN_STATUS)
    except StoppedError as err:
        return _fail(str(err), status=143)
    except UserError as err:
        _show_traceback(debug)
        return _fail(str(err))
    except OSError as err:
        _show_traceback(debug)
        message = f"{err.filename}: {err.strerror}" if err.filename and err.strerror else str(err)
        return _fail(message, status=TRY_AGAIN_STATUS if faults.kind_of(err) is Kind.PASSING else 1)
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


def _show_traceback(debug: bool) -> None:
    """The log of a host has it in any case."""
    if debug:
        traceback.print_exc()


def _joins(argv: list[str]) -> bool:
    flag = JOINING.get(argv[0])
    return flag is not None and any(argument.startswith(flag) for argument in argv)


def _several_processes() -> str | None:
    """The name of the variable that says that this is one process of several."""
    if os.environ.get("ALIGNVLM_NUM_PROCESSES", "1") != "1":
        return "ALIGNVLM_NUM_PROCESSES"
    return (
        "ALIGNVLM_AUTO_DISTRIBUTED" if os.environ.get("ALIGNVLM_AUTO_DISTRIBUTED") == "1" else None
    )


def _fail(message: str, status: int = 1) -> int:
    # Whatever becomes of the line: the others wait to be told.
    logs.say(f"alignvlm_jax: error: {message}")
    if distributed := _distributed():
        return distributed.fail(message, status)
    return status


def leave_with(status: int) -> NoReturn:
    """Ends the process, and where it failed all others of the run."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    storage.close_all()
    if status in (0, 2):
        if distributed := _distributed():
            distributed.leave()
        sys.exit(status)
    # At an orderly exit threads that still write would be waited for, and libraries' exit hooks
    # that fail for the same reason as we did would add their tracebacks to our one line. Of several
    # processes, one that failed would wait for the others, and they, in the midst of a step, for
    # it.
    os._exit(status)


def _distributed() -> ModuleType | None:
    """The module, where a command has joined processes; one that has not need not wait for jax."""
    return sys.modules.get("alignvlm_jax.parallel.distributed")


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except Exception as err:
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exc()
        status = _fail(f"unforeseen: {type(err).__name__}: {err}", status=70)
    leave_with(status)
