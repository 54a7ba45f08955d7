"""Runs that are killed, stopped, starved and lied to, until each is done; exit status 1 if one went
wrong.

    python -m tests.stress --out=runs/stress [--only=kill/2/bucket] [--trials=3] [--jobs=2]

`make stress`: an hour. Finished trials stand in OUT/trials.jsonl and are not run again.
"""

import argparse
import functools
import json
import random
import resource
import shutil
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.stress import bits, disk, faults, kills, memory, meshes, report, runs, twice
from tests.stress.runs import Hang
from tests.stress.setting import Setting
from tests.stress.workdirs import Wrong


class Case(NamedTuple):
    """A kind of trial: `trial(setting, number, rng, scratch)` returns what to note, or raises Wrong
    or Hang."""

    trials: int
    sentence: str
    trial: Callable[[Setting, int, random.Random, Path], dict]


def cases() -> dict[str, Case]:
    """Returns all cases by name, in the order of the report."""
    found = {}
    for count in (1, 2):
        for place in ("local", "bucket"):
            act = functools.partial(kills.kill, num_processes=count, of_bucket=place == "bucket")
            found[f"kill/{count}/{place}"] = Case(
                11, "SIGKILL at random moments of all phases", act
            )
    for name in ("SIGTERM", "SIGINT"):
        for count in (1, 2):
            act = functools.partial(
                kills.stop, num_processes=count, of_bucket=count == 2, name=name
            )
            sentence = (
                f"{name} at random moments of all "
                f"phases{', half to one process alone' * (count == 2)}"
            )
            found[f"{name}/{count}"] = Case(3 if count == 1 else 2, sentence, act)
    found["meshes"] = Case(
        5,
        "a run in three places of 1, 2 and 4 processes, meshes and orders of devices",
        meshes.chain,
    )
    found["full disk"] = Case(10, "the disk is full at a random moment", disk.full)
    for place in ("local", "bucket"):
        act = functools.partial(twice.second, of_bucket=place == "bucket")
        found[f"two runs/{place}"] = Case(3, "a second run in the workdir of a first", act)
    found["flipped bit"] = Case(bits.NUM_FILES, "a bit of each file of a checkpoint", bits.flip)
    found["faults"] = Case(len(faults.FAULTS), "bad input as whole commands", faults.meet)
    found["memory"] = Case(
        1, f"memory, threads and files of {memory.NUM_STEPS:,} steps", memory.flat
    )
    return found


class Stress:
    """All trials that are wanted, those that are finished, and how fast they go."""

    def __init__(self, out: Path, wanted: dict[str, int]):
        self.out = out
        self.wanted = wanted
        self.cases = cases()
        self.setting = Setting(out)
        self._file = out / "trials.jsonl"
        self._lock = threading.Lock()
        self.trials = report.read(self._file)
        self._began = time.monotonic()
        self._before = len(self._finished())
        self._at_work: dict[str, float] = {}

    def run(self, jobs: int) -> bool:
        """Runs what is missing, so many at once; returns whether all was right."""
        finished = self._finished()
        missing = [
            (case, i)
            for case, n in self.wanted.items()
            for i in range(n)
            if (case, i) not in finished
        ]
        # Long ones first, and cases in turn: what is stopped early has seen something of each.
        missing.sort(
            key=lambda one: (one[1] / max(1, self.wanted[one[0]]), list(self.wanted).index(one[0]))
        )
        if missing:
            self.setting.prepare()
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda one: self._run(*one), missing))
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{used.ru_utime + used.ru_stime:.0f} s of CPU in all processes")
        print(self.write_report())
        return not any(trial["wrong"] for trial in self.trials if trial["case"] in self.wanted)

    def write_report(self) -> str:
        sentences = {name: case.sentence for name, case in self.cases.items()}
        return report.write(self.out / "report.md", self.trials, self.wanted, sentences)

    def _finished(self) -> set[tuple[str, int]]:
        done = {(trial["case"], trial["number"]) for trial in self.trials}
        return {(case, i) for case, i in done if i < self.wanted.get(case, 0)}

    def _run(self, case: str, number: int) -> None:
        scratch = self.out / "trials" / f"{case.replace('/', '-')}-{number}"
        disk.unmount(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        rng = random.Random(zlib.crc32(f"{case}/{number}".encode()))
        wrong = ""
        noted = {}
        began = time.monotonic()
        try:
            noted = self.cases[case].trial(self.setting, number, rng, scratch)
        except (Wrong, Hang) as err:
            wrong = " ".join(str(err).split())[:400]
        except Exception as err:
            traceback.print_exc()
            wrong = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
        line = {
            "case": case,
            "number": number,
            "wrong": wrong,
            "seconds": round(time.monotonic() - began, 1),
            **noted,
        }
        with self._lock, self._file.open("a") as file:
            file.write(f"{json.dumps(line)}\n")
            self.trials.append(line)
            self._tell(line)
            self.write_report()
        if not wrong:
            shutil.rmtree(scratch)

    def _tell(self, line: dict) -> None:
        finished = len(self._finished())
        total = sum(self.wanted.values())
        rate = (finished - self._before) / (time.monotonic() - self._began)
        left = (total - finished) / rate / 60
        verdict = (
            f"WRONG: {line['wrong']}" if line["wrong"] else f"right, {line.get('faults', 1)} faults"
        )
        print(
            f"{finished}/{total}  {line['case']} {line['number']}: {verdict}  "
            f"{line['seconds']:.0f} s  ({60 * rate:.1f} trials/min, {left:.0f} min left)",
            flush=True,
        )


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/stress"))
    parser.add_argument("--only", default="", help="cases whose names begin so, such as kill/2")
    parser.add_argument("--trials", type=int, help="of each case, at most")
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    args = parser.parse_args(argv)
    wanted = {name: case.trials for name, case in cases().items() if name.startswith(args.only)}
    if not wanted:
        parser.error(f"no case begins with {args.only!r}; there are {', '.join(cases())}")
    if args.trials is not None:
        wanted = {name: min(number, args.trials) for name, number in wanted.items()}
    runs.handle_signals()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    return 0 if Stress(out, wanted).run(args.jobs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
