"""`python -m alignvlm_jax COMMAND ...`. Exit status: 0 done, 1 failed (one line on stderr), 2 wrong usage."""

import importlib
import os
import sys
import traceback

from alignvlm_jax import logs, storage
from alignvlm_jax.errors import UsageError, UserError, nearest

COMMANDS = {
    "prepare": "makes training shards of data sets, of your own documents, or of rendered ones",
    "convert": "makes a checkpoint to start from out of published weights, and exports one back",
    "plan": "says what a stage needs on a TPU slice, without one: memory, FLOPs, collectives, days",
    "inspect": "shows what a prepared folder holds, the rows that a model would get, and analyses a trained one",
    "train": "trains the stages of a config, or goes on with them",
    "evaluate": "asks a trained model the evaluation questions and scores its answers",
    "generate": "answers a question about an image or a PDF page",
    "report": "writes report.html of a run",
    "compare": "measures runs of several connectors or settings and seeds, and writes their tables and pictures",
}

JOINING = ("train", "evaluate")
"""Commands that several processes run as one."""


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
            "\n--debug, or ALIGNVLM_DEBUG=1: the traceback of an error, and all messages of libraries on the terminal"
        )
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"alignvlm_jax: error: unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return 2
    if argv[0] not in JOINING and os.environ.get("ALIGNVLM_NUM_PROCESSES", "1") != "1":
        several = " and ".join(JOINING)
        return _fail(f"{argv[0]} runs as one process, and ALIGNVLM_NUM_PROCESSES is set: only {several} join several")
    try:
        # Imported late: `--help` of a command that needs no jax should not wait for it.
        importlib.import_module(f"alignvlm_jax.commands.{argv[0]}").main(argv[1:])
    except UsageError as err:
        return _fail(str(err), status=2)
    except UserError as err:
        _show_traceback(debug)
        return _fail(str(err))
    except OSError as err:
        _show_traceback(debug)
        return _fail(f"{err.filename}: {err.strerror}" if err.filename and err.strerror else str(err))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


def _show_traceback(debug: bool) -> None:
    """The log of a host has it in any case."""
    if debug:
        traceback.print_exc()


def _fail(message: str, status: int = 1) -> int:
    print(f"alignvlm_jax: error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    if status == 1:
        # At an orderly exit threads that still write would be waited for, and libraries' exit hooks that fail for the
        # same reason as we did would add their tracebacks to our one line. Of several processes, one that failed would
        # wait for the others, and they, in the midst of a step, for it.
        sys.stdout.flush()
        storage.close_all()
        os._exit(status)
    sys.exit(status)
