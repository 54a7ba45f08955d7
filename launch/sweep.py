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
A sweep file has sweep(ARG), which yields (name, config file with its argument, changed fields). In
a value {workdir} stands for the folder of the runs' folders, as where one starts from another.
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

from alignvlm_jax import storage  # noqa: E402
from alignvlm_jax.commands import config_flag  # noqa: E402
from alignvlm_jax.config import Config  # noqa: E402
from alignvlm_jax.errors import UsageError, UserError, one_line  # noqa: E402


class Run(NamedTuple):
    """One run: what follows `python -m alignvlm_jax`, its folder, and its stages."""

    name: str
    arguments: list[str]
    workdir: str
    stages: tuple[Config, ...]

    @property
    def num_steps(self) -> int:
        return sum(stage.train.num_steps for stage in self.stages)

    @property
    def source(self) -> str:
        """The folder of the run that it starts from, "" for none."""
        return self.stages[0].init_from

    def starts_from(self, other: "Run") -> bool:
        """Whether it starts from another run: from its folder, or a checkpoint in it."""
        # As paths, of which "./runs" and "runs" are one; a bucket's are taken as they are.
        source, folder = (
            path if "://" in path else os.path.realpath(path)
            for path in (self.source, other.workdir)
        )
        return bool(self.source) and f"{source}/".startswith(f"{folder}/")

    def state(self) -> str:
        """How far it is, by its newest checkpoint, here or in a bucket.

        Raises:
          UserError: that is of another config, or the storage of an unknown kind.
          OSError: the storage does not answer.
        """
        folder = storage.path(self.workdir)
        if not storage.children(folder / "checkpoints"):
            return "not started"
        # Late: importing jax takes seconds, and most often there is nothing yet.
        from alignvlm_jax.train import checkpoint_files, workdir

        workdir.check_same(folder, self.stages)
        step = max(checkpoint_files.whole_steps(folder / "checkpoints"), default=0)
        if step >= self.num_steps:
            return "finished"
        return f"at step {step} of {self.num_steps}" if step else "not started"


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
        unfinished = told(runs)
    except BrokenPipeError:  # Not of the storage: of who reads the list.
        raise
    except (UserError, OSError) as err:
        # One of ours is a line already, of any length.
        message = err if isinstance(err, UserError) else one_line(err)
        print(f"sweep.py: error: {message}", file=sys.stderr)
        return 2 if isinstance(err, UsageError) else 1
    if not args.submit and not args.run:
        return 0
    prefix = shlex.split(args.submit) or [sys.executable, "-m", "alignvlm_jax"]
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
    path = sweep.partition(":")[0]
    runs: list[Run] = []
    for name, config, fields in _yielded(sweep):
        if any(run.name == name for run in runs):
            raise UserError(f"{path} names two runs {name!r}")
        arguments = [
            f"--config={config}",
            *common,
            *(
                f"--config.{field}={str(value).replace('{workdir}', _plain(workdir))}"
                for field, value in fields.items()
            ),
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


def _plain(workdir: str) -> str:
    """Returns a folder in one spelling, since what a run starts from is a part of its config."""
    if "://" in workdir:
        return workdir.rstrip("/")
    path = os.path.relpath(workdir)
    return os.path.abspath(workdir) if path.startswith("..") else path


def _yielded(sweep: str) -> list[tuple[str, str, dict[str, object]]]:
    """Returns what the function of a sweep FILE or FILE:ARG yields."""
    path, _, argument = sweep.partition(":")
    if not Path(path).is_file():
        raise UsageError(f"no sweep file {path!r}")
    try:
        generate = runpy.run_path(path).get("sweep")
        if generate is not None:
            # Unpacked here, so that a run of the wrong form is the file's fault, too.
            return [
                (name, config, dict(fields))
                for name, config, fields in generate(*([argument] if argument else []))
            ]
    except UserError:
        raise
    except Exception as err:  # A sweep file is Python, and may raise anything.
        message = f"sweep file {sweep} failed: {type(err).__name__}: {one_line(err)}"
        raise UserError(message) from err
    raise UsageError(f"{path} has no sweep()")


def told(runs: Sequence[Run]) -> list[Run]:
    """Prints how far each run is, and returns those that are not finished.

    Raises:
      UserError, OSError: see `Run.state`; of all runs that are of another config after the last.
    """
    width = max(len(run.name) for run in runs)
    unfinished = []
    others = []
    _ = storage.path(runs[0].workdir)  # For what it raises: a storage of an unknown kind.
    for run in runs:
        try:
            state = run.state()
        except UserError as err:
            others.append(err)
            state = "of another config"
        print(f"{run.name:{width}}  {state}", flush=True)
        if state != "finished":
            unfinished.append(run)
    if others:
        number = f"{len(others)} of {len(runs)} runs cannot go on, the first: " if runs[1:] else ""
        raise UserError(f"{number}{others[0]}")
    return unfinished


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
        left = f"; {len(work.left_out)} that start from them left out" if work.left_out else ""
        of = f"{len(work.failed)} of {len(runs)}"
        print(f"sweep.py: error: {of} failed: {names}{left}", file=sys.stderr)
    return int(bool(work.failed))


class _Work:
    """The runs that wait, those that run, each with its share of the cores, those that failed, and
    those that were left out since what they start from failed or was left out."""

    def __init__(self, runs: Sequence[Run], prefix: list[str], jobs: int) -> None:
        self._runs = runs
        self._prefix = prefix
        self._jobs = jobs
        self._shares = list(range(jobs))
        self.waiting = list(runs)
        self.running: dict[subprocess.Popen, tuple[Run, int]] = {}
        self.failed: list[Run] = []
        self.left_out: list[Run] = []

    def start_ready(self) -> None:
        """Starts runs that wait for no other, as many as there are shares for.

        Raises:
          UserError: all that wait start from one another.
          OSError: the command is not there, or the log cannot be written.
        """
        for run in self.waiting.copy():
            sources = [one for one in self._runs if one is not run and run.starts_from(one)]
            busy = [*self.waiting, *(run for run, _ in self.running.values())]
            missing = [one for one in sources if one in self.failed or one in self.left_out]
            if missing:
                how = "failed" if missing[0] in self.failed else "was left out"
                print(f"{run.name}  not started: {missing[0].name} {how}", flush=True)
                self.waiting.remove(run)
                self.left_out.append(run)
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
                if process.returncode:
                    self.failed.append(run)
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
    return Run(name, ["train", *arguments, f"--workdir={folder}"], folder, stages)


if __name__ == "__main__":
    status = 0
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # Who reads the list has seen enough, as `head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
