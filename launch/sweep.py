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
import contextlib
import importlib.util
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
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

    def starts_from(self, other: "Run") -> bool:
        """Whether it starts from another run: from its folder, or a checkpoint in it."""
        # As paths, of which "./runs" and "runs" are one; a bucket's are taken as they are.
        source, folder = (
            path if "://" in path else os.path.realpath(path)
            for path in (self.source, other.workdir)
        )
        return bool(self.source) and f"{source}/".startswith(f"{folder}/")

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
    if args.jobs > 1 and "://" in args.workdir:
        parser.error(f"--jobs writes logs beside the runs, and {args.workdir} is no folder here")
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
    if args.dry_run:
        for run in unfinished:
            print(shlex.join([*prefix, *run.arguments]))
        return 0
    try:
        return start(unfinished, prefix, args.jobs)
    except UserError as err:
        print(f"sweep.py: error: {err}", file=sys.stderr)
        return 1


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


def start(runs: Sequence[Run], prefix: list[str], jobs: int = 1) -> int:
    """Hands every run to a command, `jobs` at a time; returns the exit status.

    Several share the cores, and what each prints goes to WORKDIR.log. A run waits for the one that
    it starts from, and is left out where that failed; another that fails keeps none from starting.
    """
    work = _Work(runs, prefix, jobs)
    with _signals() as came:
        try:
            while (work.waiting or work.running) and not came:
                work.start_ready()
                work.take_ended(came)
        except OSError as err:
            _end(work.running)
            print(f"sweep.py: error: {err.filename or 'output'}: {err.strerror}", file=sys.stderr)
            return 1
        if signal.SIGTERM in came:
            _end(work.running)
            return 143
        if came:
            # The runs have had their own, and save before they end: a second would end them.
            _wait(work.running)
            print("stopped; the same command goes on", file=sys.stderr)
            return 1
    if work.failed:
        names = ", ".join(run.name for run in work.failed)
        of = f"{len(work.failed)} of {len(runs)}"
        print(f"sweep.py: error: {of} failed: {names}", file=sys.stderr)
    return int(bool(work.failed))


class _Work:
    """The runs that wait, those that run, each with its share of the cores, and those that failed
    or were left out."""

    def __init__(self, runs: Sequence[Run], prefix: list[str], jobs: int) -> None:
        self._runs = runs
        self._prefix = prefix
        self._jobs = jobs
        self._shares = list(range(jobs))
        self.waiting = list(runs)
        self.running: dict[subprocess.Popen, tuple[Run, int]] = {}
        self.failed: list[Run] = []

    def start_ready(self) -> None:
        """Starts runs that wait for no other, as many as there are shares for.

        Raises:
          UserError: all that wait start from one another.
          OSError: the command is not there, or the log cannot be written.
        """
        for run in self.waiting.copy():
            sources = [one for one in self._runs if one is not run and run.starts_from(one)]
            busy = [*self.waiting, *(run for run, _ in self.running.values())]
            if any(one in self.failed for one in sources):
                print(f"{run.name}  not started: {sources[0].name} failed", flush=True)
                self.waiting.remove(run)
                self.failed.append(run)
            elif self._shares and not any(one in busy for one in sources):
                command = [*self._prefix, *run.arguments]
                print(shlex.join(command), flush=True)
                log = f"{run.workdir}.log" if self._jobs > 1 else ""
                process = _started(command, log, self._shares[0], self._jobs)
                self.running[process] = (run, self._shares.pop(0))
                self.waiting.remove(run)
        if self.waiting and not self.running:
            names = ", ".join(run.name for run in self.waiting)
            raise UserError(f"runs that start from one another: {names}")

    def take_ended(self, came: Sequence[int]) -> None:
        """Waits until a run has ended or a signal came, and notes what has ended."""
        while self.running and not came:
            ended = [process for process in self.running if process.poll() is not None]
            for process in ended:
                run, share = self.running.pop(process)
                self._shares.append(share)
                self.failed += [run] * bool(process.returncode)
                if self._jobs > 1:
                    how = f"failed, see {run.workdir}.log" if process.returncode else "finished"
                    left = len(self.waiting) + len(self.running)
                    print(f"{run.name}  {how}; {left} left", flush=True)
            if ended:
                return
            time.sleep(0.1)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the list that SIGINT and SIGTERM are put into, in the place of what they do."""
    came: list[int] = []
    # An exception instead could come when a run has started and is not yet known as such.
    handlers = {
        one: signal.signal(one, lambda number, _: came.append(number))
        for one in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(one) is not signal.SIG_IGN
    }
    try:
        yield came
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)


def num_cores() -> int:
    """Returns on how many cores this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started(command: list[str], log: str, share: int, jobs: int) -> subprocess.Popen:
    """Starts a command on every `jobs`-th core, from that of number `share` on; its output goes to
    a file, or with "" to where ours goes."""
    with contextlib.ExitStack() as stack:
        output = None
        if log:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(open(log, "ab"))
        if hasattr(os, "sched_setaffinity"):
            cores = os.sched_getaffinity(0)
            stack.callback(os.sched_setaffinity, 0, cores)
            # Of this thread, whose children inherit it: XLA makes a thread for each such core.
            os.sched_setaffinity(0, sorted(cores)[share::jobs])
        return subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT)


def _end(running: Collection[subprocess.Popen]) -> None:
    """Ends all of these, and waits for them to save."""
    for process in running:
        process.terminate()
    _wait(running)


def _wait(running: Collection[subprocess.Popen]) -> None:
    for process in running:
        process.wait()


def _run(name: str, arguments: list[str], workdir: str, stages: tuple[Config, ...]) -> Run:
    folder = f"{workdir.rstrip('/')}/{name}"
    num_steps = sum(stage.train.num_steps for stage in stages)
    arguments = ["train", *arguments, f"--workdir={folder}"]
    return Run(name, arguments, folder, num_steps, stages[0].init_from)


if __name__ == "__main__":
    status = 0
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # Who reads the list has seen enough, as `head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
