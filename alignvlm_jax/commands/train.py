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

MADE_BY = {
    "data/debian": "`make data` makes it in a checkout",
    "data/demo": "`prepare --format=documents --out=data/demo` makes it",
}
"""How the folders are made that the package's configs read."""


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
        again = f"{launcher} {shlex.join(['train', *argv])}"
        raise StoppedError(f"{err}; go on with: {again}", err.number) from err


def _parse(argv: list[str]) -> tuple[Path, ConfigFlags, list[str]]:
    """Returns the folder of the run, the flags of its config, and the other arguments."""
    parser = usage.parser(
        "train",
        description="Trains the stages of a config. The same command goes on with a run that was "
        "stopped.",
        usage=f"%(prog)s {config_flag.USAGE} --workdir=DIR [--config.a.b=VALUE ...]",
        epilog=config_flag.HELP,
        others=config_flag.flags_of_fields(),
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
    usage.check_workdir(args.workdir, "train")
    return args.workdir, given, rest


def _stages(given: ConfigFlags, argv: list[str]) -> tuple[Config, ...]:
    """Returns the stages of the config; raises UserError if it is wrong."""
    with _told_to_others(argv):
        if not usage.several_processes():
            # Now, as far as flags tell: the config file imports jax.
            for flag in given.overrides:
                name, _, folder = flag.partition("=")
                if name == "--config.data.dir":
                    _check_exists(folder, is_default=False)
        found = config_flag.stages(given)
        # Of several hosts each may have the data elsewhere: they are asked once they are joined.
        if not usage.several_processes():
            is_default = not any(flag.startswith("--config.data.dir=") for flag in given.overrides)
            for data in dict.fromkeys(stage.data.dir for stage in found if not stage.data.sources):
                tokenizer = found[0].data.tokenizer
                _check_data(data, tokenizer, is_default)
        return found


def _check_data(folder: str, tokenizer: str, is_default: bool) -> None:
    """Raises UserError, with the command that makes it, where `data.dir` is no folder, or one of
    files that are yet to be prepared.

    Args:
      folder: `data.dir`.
      tokenizer: `data.tokenizer`.
      is_default: whether the config names the folder, and no flag.
    """
    if storage.is_bucket(folder) or not folder:
        return
    _check_exists(folder, is_default)
    # Late: it imports the libraries of all formats.
    from alignvlm_jax.commands import next_commands
    from alignvlm_jax.data.shards import ENDINGS
    from alignvlm_jax.ingest.formats import survey

    if os.path.isdir(folder) and any(name.endswith(ENDINGS) for name in os.listdir(folder)):
        return
    # What no format reads is left to those who look for shards.
    found = survey.survey(folder)
    if found.by_format:
        out = survey.quoted(f"data/{Path(os.path.abspath(folder)).stem}")
        raise UserError(
            f"{found}, yet to be prepared: {next_commands.command('prepare')} "
            f"--source={survey.quoted(folder)} --out={out} "
            f"--tokenizer={survey.quoted(tokenizer or 'TOKENIZER')}, then train with "
            f"--config.data.dir={out}"
        )


def _check_exists(folder: str, is_default: bool) -> None:
    """Raises UserError, as `_check_data`, where `data.dir` is no folder."""
    if folder and not storage.is_bucket(folder) and not os.path.exists(folder):
        default = ", which the config reads by default" if is_default else ""
        how = MADE_BY.get(folder, "`prepare` makes one of your own documents")
        raise UserError(
            f"there is no folder {folder}{default}: {how}; another one is named by "
            "--config.data.dir=FOLDER"
        )


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
