"""Work on several processes, whose results come as they are made."""

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
    """Calls `function(task)`, which is a generator, for all tasks, and yields what it yields, of
    all tasks mixed. One worker is this process. The workers end with the iteration, also where it
    is left early.

    Raises:
      UserError: one that `function` raised, or a worker was killed.
      OSError: one that `function` raised, as of a full disk.
    """
    waiting = collections.deque(tasks)
    num_workers = min(num_workers, len(waiting))
    if num_workers <= 1:
        for task in waiting:
            yield from function(task)
        return
    workers = _start(function, num_workers)
    try:
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
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


def _start(
    function: Callable, num_workers: int
) -> dict[connection.Connection, multiprocessing.Process]:
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
            theirs.close()  # else the end of the worker would not end the line
            workers[ours] = process
    finally:
        signal.signal(signal.SIGINT, handler)
    return workers


def _receive(line: connection.Connection, process: multiprocessing.Process) -> tuple[bool, Any]:
    """Returns whether the task is done, and what it yielded where it is not."""
    try:
        kind, value = line.recv()
    except EOFError as err:
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
        line.send(("failed", RuntimeError(f"in a worker:\n{traceback.format_exc()}")))
