"""What `train` does once its flags are read."""

from pathlib import Path

from rich.console import Console

from alignvlm_jax.benchmarks.generation_eval import GENERATION
from alignvlm_jax.commands import next_commands
from alignvlm_jax.config import Config
from alignvlm_jax.parallel import compile_cache, distributed
from alignvlm_jax.train import goodput, loop
from alignvlm_jax.train.loop import Stopped
from alignvlm_jax.train.validation import VALIDATION

EVALUATORS = (VALIDATION, GENERATION)


def run(
    stages: tuple[Config, ...], workdir: Path, config_flags: list[str], argv: list[str]
) -> None:
    """Trains the stages of a config.

    Args:
      stages: the stages.
      workdir: folder of the run.
      config_flags: the arguments that make the stages.
      argv: the command's arguments, which must be the same on all processes.

    Raises:
      UserError: what the config names is missing or wrong.
      Stopped: the run was told to stop, and has saved.
    """
    distributed.initialize(argv)
    # All processes train, and the main one alone speaks.
    console = Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())
    try:
        with compile_cache.kept_in(workdir):
            loop.train(stages, workdir, console, EVALUATORS, goodput.process_began(), config_flags)
    except Stopped:
        distributed.leave()
        raise
    folders = [folder for stage in stages for folder in stage.data.folders]
    console.print(next_commands.after_train(workdir, folders), markup=False)
