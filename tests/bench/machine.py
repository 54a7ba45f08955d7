"""How much of the machine other processes take while a benchmark runs (Linux).

    with machine.watched():
        main()

A time that was taken beside other work says little: above LIMIT the program ends with status 1,
unless --busy is among its arguments.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LIMIT = 0.10
FLAG = "--busy"
PROC = Path("/proc")


class Ticks(NamedTuple):
    """Clock ticks that all cores have spent, busy and in all, and those of this process and its
    descendants."""

    busy: int
    total: int
    own: int

    @classmethod
    def now(cls, root: Path = PROC, pid: int | None = None) -> "Ticks":
        """Reads them of a folder like /proc."""
        # user, nice, system, idle, iowait, irq, softirq, steal; guests count as user, too.
        spent = [int(x) for x in (root / "stat").read_text().split("\n")[0].split()[1:9]]
        waiting = spent[3] + spent[4]
        own = _own_ticks(root, os.getpid() if pid is None else pid)
        return cls(sum(spent) - waiting, sum(spent), own)


def others(before: Ticks, after: Ticks) -> float:
    """Returns the fraction of the machine that other processes took between two moments."""
    spent = (after.busy - before.busy) - (after.own - before.own)
    return max(spent, 0) / max(after.total - before.total, 1)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Prints, after what is done within, what others took of the machine meanwhile.

    Raises:
      SystemExit: it was more than LIMIT, and the program was called without --busy, which is taken
        out of its arguments.
    """
    may_be_busy = FLAG in sys.argv
    sys.argv[:] = [one for one in sys.argv if one != FLAG]
    before = Ticks.now()
    began = time.monotonic()
    yield
    taken = others(before, Ticks.now())
    seconds = time.monotonic() - began
    print(f"\nOther processes took {taken:.0%} of the machine for {seconds:.0f} s.", flush=True)
    if taken > LIMIT and not may_be_busy:
        raise SystemExit(
            f"other processes took {taken:.0%} of the machine, above {LIMIT:.0%}: these times do "
            f"not count; run it again on an idle machine, or with {FLAG}"
        )


def _own_ticks(root: Path, pid: int) -> int:
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in root.glob("[0-9]*/stat"):
        # A process may have ended since it was listed.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # Its name, in parentheses, may hold spaces and parentheses.
            fields = path.read_text().rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number] = int(fields[1])
            # utime, stime, and those of children that have ended and been waited for.
            ticks[number] = sum(int(x) for x in fields[11:15])
    own = {pid}
    # Children may have lower numbers than their parents: until nothing is added.
    while found := {one for one, parent in parents.items() if parent in own} - own:
        own |= found
    return sum(ticks.get(one, 0) for one in own)
