"""`train`: trains the stages of a config, or goes on with them."""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from alignvlm_jax import storage
from alignvlm_jax.commands import config_flag, usage
from alignvlm_jax.commands.config_flag import ConfigFlags
from alignvlm_jax.config import Config
from alignvlm_jax.errors import StoppedError, UserError


def main(argv: list[str]) -> None:
    """Runs the command.

    Raises:
      UserError: the input is wrong.
      StoppedError: the run was told to stop, and has saved.
    """
    workdir, given, others = _parse(argv)
    stages = _stages(given, argv)
    # Only now: what is misspelt should be answered before all of this is imported.
    from alignvlm_jax.commands.work import train

    try:
        train.run(stages, workdir, [flag for flag in argv if flag not in others], argv)
    except train.Stopped as err:
        # The launch scripts name themselves here, so that the advice is the command that was typed.
        launcher = os.environ.get("ALIGNVLM_LAUNCHER") or shlex.join(usage.again())
        raise StoppedError(f"{err}; go on with: {launcher} {shlex.join(['train', *argv])}") from err


def _parse(argv: list[str]) -> tuple[Path, ConfigFlags, list[str]]:
    """Returns the folder of the run, the flags of its config, and the other arguments."""
    parser = usage.parser(
        "train",
        description="Trains the stages of a config. The same command goes on with a run that was "
        "stopped.",
        usage=f"%(prog)s {config_flag.USAGE} --workdir=DIR [--config.a.b=VALUE ...]",
        epilog=config_flag.HELP,
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=storage.path,
        help="folder of checkpoints, metrics and the report",
    )
    with _told_to_others(argv):
        given, rest = config_flag.split(argv)
        args = parser.parse_args(rest)
    if given.file is None:
        parser.error(config_flag.REQUIRED)
    return args.workdir, given, rest


def _stages(given: ConfigFlags, argv: list[str]) -> tuple[Config, ...]:
    """Returns the stages of the config; raises UserError if it is wrong."""
    with _told_to_others(argv):
        return config_flag.stages(given)


@contextlib.contextmanager
def _told_to_others(argv: list[str]) -> Iterator[None]:
    """A context whose UserError the other processes of a run hear of."""
    try:
        yield
    except UserError:
        # The config may be wrong on this host alone. Joined, this process can tell the others that
        # it failed; else they would wait for it, and not know why.
        if usage.several_processes():
            from alignvlm_jax.parallel import distributed

            distributed.initialize(argv)
        raise
