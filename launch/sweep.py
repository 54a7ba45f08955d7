#!/usr/bin/env python3
"""Lists, runs or submits the runs of a sweep; what is finished is skipped, what was stopped goes
on.

    # Lists the runs.
    launch/sweep.py configs/sweeps/connectors.py --workdir=runs/connectors
    # Runs them here, one after the other.
    launch/sweep.py configs/sweeps/connectors.py --workdir=runs/connectors --run
    # Four at a time, each on a quarter of the cores: small models do not fill them alone.
    launch/sweep.py configs/sweeps/connectors.py --workdir=runs/connectors --run --jobs=4
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
import time
from collections.abc import Iterable, Sequence
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
    """One run: what follows `python -m alignvlm_jax`, its folder, its length in steps, and the
    folder of the run that it starts from, "" for none."""

    name: str
    arguments: list[str]
    workdir: str
    num_steps: int
    source: str

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
        usage="launch/sweep.py SWEEP_FILE[:ARG] --workdir=DIR [--run [--jobs=N] | "
        "--submit=COMMAND] [-- --config.a.b=VALUE ...]"
    )
    parser.add_argument("sweep")
    parser.add_argument("--workdir", required=True, help="folder of the runs' folders")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--run", action="store_true", help="here, one after the other or --jobs")
    how.add_argument("--submit", default="", help="a launch command, to which each run is handed")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, which share the cores; default 1"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    cores = num_cores()
    if not 1 <= args.jobs <= cores:
        parser.error(f"--jobs is {args.jobs}; this machine has cores for 1 to {cores}")
    if args.jobs > 1 and not args.run:
        parser.error("--jobs needs --run: what is submitted is not waited for")
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
    unfinished = [run for run in runs if run.state() != "finished"]
    if args.jobs > 1 and not args.dry_run:
        return together(unfinished, prefix, args.jobs)
    return start(unfinished, prefix, args.dry_run)


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
    return _report(failed, len(runs))


def together(runs: Sequence[Run], prefix: list[str], jobs: int) -> int:
    """Trains `jobs` runs at a time, each on its share of the cores; a run waits for the one that it
    starts from. What a run prints goes to WORKDIR.log."""
    waiting = list(runs)
    shares = list(range(jobs))
    running: dict[subprocess.Popen, tuple[Run, int, float]] = {}
    failed = []
    try:
        while waiting or running:
            busy = {run.workdir for run in (*waiting, *(run for run, _, _ in running.values()))}
            ready = [run for run in waiting if run.source not in busy]
            for run, share in zip(ready, shares.copy(), strict=False):
                process = _started([*prefix, *run.arguments], f"{run.workdir}.log", share, jobs)
                waiting.remove(run)
                shares.remove(share)
                running[process] = (run, share, time.monotonic())
            for process in _ended(running):
                run, share, began = running.pop(process)
                shares.append(share)
                failed += [run.name] * bool(process.returncode)
                how = f"failed, see {run.workdir}.log" if process.returncode else "finished"
                seconds = time.monotonic() - began
                left = len(waiting) + len(running)
                print(f"{run.name}  {how} after {seconds:.0f} s; {left} left", flush=True)
    except KeyboardInterrupt:
        # They have had the Ctrl-C too, and save before they end.
        for process in running:
            process.wait()
        print("stopped; the same command goes on", file=sys.stderr)
        return 1
    return _report(failed, len(runs))


def num_cores() -> int:
    """Returns on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started(command: list[str], log: str, share: int, jobs: int) -> subprocess.Popen:
    """Starts a command on every `jobs`-th core, from that of number `share` on."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        if not hasattr(os, "sched_setaffinity"):
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        cores = os.sched_getaffinity(0)
        # Of this thread, whose children inherit it: XLA makes as many threads as it may use cores.
        os.sched_setaffinity(0, sorted(cores)[share::jobs])
        try:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        finally:
            os.sched_setaffinity(0, cores)


def _ended(running: Iterable[subprocess.Popen]) -> list[subprocess.Popen]:
    """Waits until some of these have ended; returns them."""
    while not (ended := [process for process in running if process.poll() is not None]):
        time.sleep(0.1)
    return ended


def _report(failed: Sequence[str], number: int) -> int:
    """Says which of a number of runs failed; returns the exit status."""
    if failed:
        print(
            f"sweep.py: error: {len(failed)} of {number} failed: {', '.join(failed)}",
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
    arguments = ["train", *arguments, f"--workdir={folder}"]
    return Run(name, arguments, folder, num_steps, stages[0].init_from.rstrip("/"))


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # Who reads the list has seen enough, as `head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
