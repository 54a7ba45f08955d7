"""What runs the parts of `prepare`: worker processes that run generators and stream their values to
the parent; or Apache Beam, for sources that are too large for one machine.

`multiprocessing.Pool` cannot serve: it hangs for ever when a worker is killed (as by the kernel
when memory runs out), and it returns no value before its task is done. Under Beam the same
functions write the same bytes.
"""

import collections
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from typing import Any

from alignvlm_jax.errors import UserError


def run(
    function: Callable[[Any], Iterator[Any]], tasks: Iterable[Any], num_workers: int
) -> Iterator[Any]:
    """Runs the generator `function` on all tasks, on several processes, and yields its values.

    Values of different tasks come mixed, in the order in which they are made. With one worker the
    tasks run in this process. The workers end with the iteration, even if it is left early.

    Args:
      function: called as `function(task)` in a worker; it has to be picklable.
      tasks: the arguments, picklable as well.
      num_workers: the number of processes; there are never more than tasks.

    Raises:
      UserError: `function` raised it, or a worker was killed.
      OSError: `function` raised it, as on a full disk.
    """
    waiting = collections.deque(tasks)
    num_workers = min(num_workers, len(waiting))
    if num_workers <= 1:
        for task in waiting:
            yield from function(task)
        return
    workers = _start(function, num_workers)
    try:
        # A worker holds one task at a time, and gets the next when it is done: tasks of unequal
        # size balance themselves.
        for line in workers:
            line.send(waiting.popleft())
        busy = set(workers)
        while busy:
            for line in connection.wait(busy):
                is_done, value = _receive(line, workers[line])
                if not is_done:
                    yield value
                elif waiting:
                    line.send(waiting.popleft())
                else:
                    busy.remove(line)
    finally:
        # All are ended before any is joined, so that they go down together. A caller that stops
        # early (an error, a closed generator) leaves no process behind.
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def under_beam(name: str, flags: list[str]) -> Callable[[Callable, list], None]:
    """Returns a function that runs a `job.UnitWriter` on its tasks under Apache Beam.

    All workers have to see the writer's folder, on a shared disk or a mounted bucket.

    Args:
      name: Beam's name of a runner, as DirectRunner or DataflowRunner.
      flags: Beam's pipeline options, as `--key=value`.

    Raises:
      UserError: Beam is not installed, or knows no such runner or flag.
    """
    # Here: it takes seconds, and most machines do not have it.
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as err:
        raise UserError(
            "Apache Beam is not installed; `make beam` puts it into .venv-beam "
            "(requirements-beam.txt)"
        ) from err
    try:
        # The runner is created here only to fail early: a Pipeline would do so after the source
        # was listed.
        options = PipelineOptions([f"--runner={name}", *flags])
        apache_beam.runners.create_runner(name)
    except (ValueError, ImportError, AttributeError) as err:
        raise UserError(f"Apache Beam has no runner {name!r} with flags {flags} ({err})") from err

    def run_parts(writer: Callable, tasks: list) -> None:
        with apache_beam.Pipeline(options=options) as pipeline:
            # Create makes one bundle of its values, and one worker would do it all: Reshuffle
            # breaks the bundle up.
            _ = (
                pipeline
                | apache_beam.Create(tasks)
                | apache_beam.Reshuffle()
                | apache_beam.FlatMap(writer)
            )

    return run_parts


def _start(
    function: Callable, num_workers: int
) -> dict[connection.Connection, multiprocessing.Process]:
    """Starts the workers; returns each process by the parent's end of its pipe."""
    # Spawned, not forked: a caller may hold threads (jax, grain) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = {}
    # Ctrl-C reaches the whole process group. Workers inherit that it is ignored: the parent alone
    # speaks and ends them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, theirs), daemon=True)
            process.start()
            # Else the parent would hold the worker's end open itself, and never see an EOFError
            # when the worker dies.
            theirs.close()
            workers[ours] = process
    finally:
        signal.signal(signal.SIGINT, handler)
    return workers


def _receive(line: connection.Connection, process: multiprocessing.Process) -> tuple[bool, Any]:
    """Returns (whether the worker's task is done, the value that it yielded if it is not).

    Raises:
      UserError: a signal killed the worker, or `function` raised it.
      RuntimeError: the worker ended by itself, or `function` raised an unforeseen exception.
    """
    try:
        kind, value = line.recv()
    except EOFError as err:
        # The exit code is None until the process is joined; -N means killed by signal N.
        process.join()
        if process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            hint = " (out of memory? fewer --num_workers need less)" if name == "SIGKILL" else ""
            raise UserError(
                f"a worker was killed by {name}{hint}; the same command goes on"
            ) from err
        raise RuntimeError(f"a worker ended with status {process.exitcode}") from err
    if kind == "failed":
        raise value
    return kind == "done", value


def _work(function: Callable, line: connection.Connection) -> None:
    """Serves tasks in a worker process until the parent ends it."""
    try:
        while True:
            for value in function(line.recv()):
                line.send(("value", value))
            line.send(("done", None))
    except (EOFError, BrokenPipeError):
        return  # The parent is gone.
    except (UserError, OSError) as err:
        line.send(("failed", err))
    except Exception:
        # Other exceptions may not survive pickling, and a traceback never does: the text travels.
        line.send(("failed", RuntimeError(f"in a worker:\n{traceback.format_exc()}")))
