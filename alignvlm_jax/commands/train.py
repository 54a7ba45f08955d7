"""`train`: trains the stages of a config, or goes on with them."""

import argparse
import os
import shlex
import sys

from rich.console import Console

from alignvlm_jax import storage
from alignvlm_jax.benchmarks.generation_eval import GENERATION
from alignvlm_jax.commands import config_flag
from alignvlm_jax.errors import StoppedError, UserError
from alignvlm_jax.parallel import compile_cache, distributed
from alignvlm_jax.train import goodput, loop
from alignvlm_jax.train.validation import VALIDATION

EVALUATORS = (VALIDATION, GENERATION)


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
      UserError: the input is wrong.
      StoppedError: the run was told to stop, and has saved.
    """
    parser = argparse.ArgumentParser(
        prog="python -m alignvlm_jax train",
        description="Trains the stages of a config. The same command goes on with a run that was "
        "stopped.",
        usage="%(prog)s --config=FILE[:ARG] --workdir=DIR [--config.a.b=VALUE ...]",
        epilog=config_flag.HELP,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=storage.path,
        help="folder of checkpoints, metrics and the report",
    )
    try:
        stages, rest = config_flag.parse(argv)
    except UserError:
        # The config may be wrong on this host alone. Joined, this process can tell the others that
        # it failed; else they would wait for it, and not know why.
        distributed.initialize(argv)
        raise
    args = parser.parse_args(rest)
    if stages is None:
        parser.error("--config=FILE is required")
    distributed.initialize(argv)
    # All processes train, and the main one alone speaks.
    console = Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())
    try:
        with compile_cache.kept_in(args.workdir):
            flags = [flag for flag in argv if flag not in rest]
            loop.train(stages, args.workdir, console, EVALUATORS, goodput.process_began(), flags)
    except loop.Stopped as err:
        distributed.leave()
        # The launch scripts name themselves here, so that the advice is the command that was typed.
        launcher = (
            os.environ.get("ALIGNVLM_LAUNCHER") or f"{shlex.quote(sys.executable)} -m alignvlm_jax"
        )
        raise StoppedError(f"{err}; go on with: {launcher} {shlex.join(['train', *argv])}") from err
