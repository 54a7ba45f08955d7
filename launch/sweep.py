#!/usr/bin/env python3
"""Lists, runs or submits the runs of a sweep; what is finished is skipped, what was stopped goes
on.

    # Lists the runs.
    launch/sweep.py configs/sweeps/connectors.py --workdir=runs/connectors
    # Runs them here, one after the other.
    launch/sweep.py configs/sweeps/connectors.py --workdir=runs/connectors --run
    # Puts a command before each.
    launch/sweep.py configs/sweeps/connectors.py:stage2.py --workdir=runs/sweep \\
        --submit='launch/slurm_gpu.sh --nodes=8 --'

What follows a `--` every run gets: -- --config.init_from=runs/stage1 --config.data.dir=data/stage2
A sweep file has sweep(ARG), which yields (name, config file with its argument, changed fields).
"""

import argparse
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
# Started by its name it runs on the system's Python, which knows nothing of what `make setup`
# installed.
if __name__ == "__main__" and importlib.util.find_spec("ml_collections") is None:
    python = REPOSITORY / ".venv" / "bin" / "python"
    # Where it is this very Python, an installation was cut short.
    if not python.exists() or Path(sys.prefix).resolve() == (REPOSITORY / ".venv").resolve():
        sys.exit("sweep.py: error: there is no .venv with what it needs: run `make setup`")
    os.execv(python, [str(python), *sys.argv])

sys.path.insert(0, str(REPOSITORY))

from alignvlm_jax.commands import config_flag  # noqa: E402
from alignvlm_jax.config import Config  # noqa: E402
from alignvlm_jax.errors import UsageError, UserError  # noqa: E402


class Run(NamedTuple):
    """One run: what follows `python -m alignvlm_jax`, its folder, and its length in steps."""

    name: str
    arguments: list[str]
    workdir: str
    num_steps: int

    def last_step(self) -> int:
        """The newest step that is saved; 0 without one.

        Orbax names a checkpoint by its step once it is whole.
        """
        folder = Path(self.workdir, "checkpoints")
        return max(
            (int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0
        )

    def state(self) -> str:
        """How far it is."""
        step = self.last_step()
        return (
            "finished"
            if step >= self.num_steps
            else f"at step {step} of {self.num_steps}"
            if step
            else "not started"
        )


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 done, 1 a run failed or cannot be, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        usage="launch/sweep.py SWEEP_FILE[:ARG] --workdir=DIR [--run | --submit=COMMAND] [-- "
        "--config.a.b=VALUE ...]"
    )
    parser.add_argument("sweep")
    parser.add_argument("--workdir", required=True, help="folder of the runs' folders")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--run", action="store_true", help="here, one after the other")
    how.add_argument("--submit", default="", help="a launch command, to which each run is handed")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    try:
        runs = read(args.sweep, args.workdir, argv[end + 1 :])
    except UserError as err:
        print(f"sweep.py: error: {err}", file=sys.stderr)
        return 2 if isinstance(err, UsageError) else 1
    width = max(len(run.name) for run in runs)
    for run in runs:
        print(f"{run.name:{width}}  {run.state()}", flush=True)
    prefix = (
        shlex.split(args.submit)
        if args.submit
        else [sys.executable, "-m", "alignvlm_jax"]
        if args.run
        else None
    )
    if prefix is None:
        return 0
    return start([run for run in runs if run.state() != "finished"], prefix, args.dry_run)


def read(sweep: str, workdir: str, common: Sequence[str] = ()) -> list[Run]:
    """Returns the runs of a sweep, each of them checked; a run's own fields go before the `common`
    ones.

    Raises:
      UsageError: no such file, or no sweep in it; something common that is no config field.
      UserError: a field that does not exist, or two runs of one name.
    """
    path, _, argument = sweep.partition(":")
    if not Path(path).is_file():
        raise UsageError(f"no sweep file {path!r}")
    generate = runpy.run_path(path).get("sweep")
    if generate is None:
        raise UsageError(f"{path} has no sweep()")
    runs: list[Run] = []
    for name, config, fields in generate(*([argument] if argument else [])):
        if any(run.name == name for run in runs):
            raise UserError(f"{path} names two runs {name!r}")
        arguments = [
            f"--config={config}",
            *common,
            *(f"--config.{field}={value}" for field, value in fields.items()),
        ]
        try:
            stages, rest = config_flag.parse(arguments)
        except UserError as err:
            raise UserError(f"run {name}: {err}") from err
        if rest:
            raise UsageError(f"after -- come config fields, as --config.seed=1, not {rest[0]!r}")
        runs.append(_run(name, arguments, workdir, stages))
    if not runs:
        raise UserError(f"{sweep} has no runs")
    return runs


def start(runs: Sequence[Run], prefix: list[str], dry_run: bool) -> int:
    """Hands every run to a command, one after the other; one that fails does not keep the others
    from starting."""
    failed = []
    for run in runs:
        command = [*prefix, *run.arguments]
        print(shlex.join(command), flush=True)
        if dry_run:
            continue
        try:
            status = _status(command)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 1
        except OSError as err:
            print(f"sweep.py: error: {command[0]}: {err.strerror}", file=sys.stderr)
            return 1
        if status:
            failed.append(run.name)
    if failed:
        print(
            f"sweep.py: error: {len(failed)} of {len(runs)} failed: {', '.join(failed)}",
            file=sys.stderr,
        )
    return int(bool(failed))


def _status(command: list[str]) -> int:
    """Runs a command.

    Of Ctrl-C the run has had its own, and saves before it ends; subprocess.run would kill it.
    """
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def _run(name: str, arguments: list[str], workdir: str, stages: tuple[Config, ...]) -> Run:
    folder = f"{workdir.rstrip('/')}/{name}"
    num_steps = sum(stage.train.num_steps for stage in stages)
    return Run(name, ["train", *arguments, f"--workdir={folder}"], folder, num_steps)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # Who reads the list has seen enough, as `head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
