"""What a workdir holds, on a disk or in a fake bucket, and whether two of them hold the same."""

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.fake_bucket import FakeBucket
from tests.stress import workload

TIMES = re.compile(
    r"goodput/.*|.*_seconds|steps_per_second|data_wait_fraction|peak_memory_gib|(useful_)?mfu|.*flops.*|run_id"
)
"""Numbers of a line that say how long something took, or how much it took."""
WHOLE = "commit_success.txt"
_reading = threading.Lock()


class Wrong(Exception):
    """A run did not do what it should; the message is one line."""


class Local:
    """A workdir on a disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.argument = str(folder)

    def names(self) -> list[str]:
        """Returns the files in it, by their path from it."""
        # Not by rglob: a run that is at work may remove a folder meanwhile.
        walked = os.walk(self.folder)
        return sorted(
            os.path.relpath(os.path.join(top, name), self.folder)
            for top, _, files in walked
            for name in files
        )

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def local_copy(self, scratch: Path) -> Path:
        """Returns the folder itself."""
        return self.folder


class InBucket:
    """A workdir in a fake bucket, looked at past its faults."""

    def __init__(self, bucket: FakeBucket, name: str):
        self._bucket = bucket
        self._name = name
        self.argument = f"{bucket.url}/{name}"

    def names(self) -> list[str]:
        return [
            name.removeprefix(f"{self._name}/") for name in self._bucket.names(f"{self._name}/")
        ]

    def read(self, name: str) -> bytes:
        return self._bucket.read(f"{self._name}/{name}")

    def write(self, name: str, content: bytes) -> None:
        self._bucket.put(f"{self._name}/{name}", content)

    def local_copy(self, scratch: Path) -> Path:
        """Returns a folder with everything in it."""
        return self._bucket.get_folder(self._name, scratch)


Workdir = Local | InBucket


def newest(workdir: Workdir) -> int:
    """Returns the newest step whose checkpoint is whole; 0 without one."""
    found = (re.fullmatch(rf"checkpoints/(\d+)/{WHOLE}", name) for name in workdir.names())
    return max((int(one.group(1)) for one in found if one), default=0)


def lines(workdir: Workdir) -> list[dict]:
    """Returns the lines of metrics.jsonl without times; Wrong where one is not whole."""
    if "metrics.jsonl" not in workdir.names():
        return []
    text = workdir.read("metrics.jsonl").decode()
    if text and not text.endswith("\n"):
        raise Wrong(f"the last line of metrics.jsonl is cut: {text.splitlines()[-1][-80:]!r}")
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = json.loads(line)
        except ValueError as err:
            raise Wrong(f"line {number} of metrics.jsonl is no JSON: {line[:80]!r}") from err
        found.append({name: value for name, value in values.items() if not TIMES.fullmatch(name)})
    return found


def check_lines(found: Sequence[dict], expected: Sequence[dict], least_step: int) -> None:
    """Raises Wrong unless lines are the first ones of those expected, in order, at least all up to
    a step."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=False), start=1):
        if ours != theirs:
            names = [
                name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
            ]
            shown = ", ".join(
                f"{name} {ours.get(name)} not {theirs.get(name)}" for name in sorted(names)[:3]
            )
            raise Wrong(
                f"line {number} (step {ours['step']}) of metrics.jsonl differs in {len(names)}: "
                f"{shown}"
            )
    least = sum(line["step"] <= least_step and "loss" in line for line in expected)
    have = sum("loss" in line for line in found)
    if have < least or len(found) > len(expected):
        raise Wrong(f"metrics.jsonl has {have} steps; at least {least} are wanted")


def arrays(folder: Path, step: int = workload.TOTAL) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint's state by name, on whatever devices it was written."""
    import jax
    import orbax.checkpoint as ocp

    state = folder.absolute() / "checkpoints" / str(step) / "state"
    with _reading:
        handler = ocp.PyTreeCheckpointHandler()
        wanted = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(state).tree
        )
        tree = handler.restore(state, args=ocp.args.PyTreeRestore(restore_args=wanted))
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Raises Wrong unless all bits are the same."""
    if ours.keys() != theirs.keys():
        raise Wrong(f"the checkpoint holds other arrays: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    differing = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    if differing:
        furthest = max(
            float(np.abs(ours[n].astype(np.float64) - theirs[n]).max()) for n in differing
        )
        raise Wrong(
            f"{len(differing)} of {len(ours)} arrays differ, by at most {furthest:.3g}: "
            f"{differing[0]}"
        )


def batches(events: Sequence[Sequence[dict]]) -> dict[tuple[str, int], tuple]:
    """Returns what attempts trained on: (ids of its records, checksums) by (stage, row), of all
    processes' events.

    Raises:
      Wrong: two attempts had other records or numbers in the same rows.
    """
    found: dict[tuple[str, int], dict[tuple[int, ...], tuple]] = {}
    for of_process in events:
        for event in of_process:
            if "digest" not in event:
                continue
            place = (event["stage"], event["row"])
            rows = tuple(event["rows"])
            content = (event["ids"], event["digest"])
            if found.setdefault(place, {}).setdefault(rows, content) != content:
                raise Wrong(f"rows from {place[1]} of {place[0]} were others at the second time")
    return {place: tuple(sorted(parts.items())) for place, parts in found.items()}


def steps(events: Sequence[dict]) -> list[int]:
    """Returns the steps, counted over the run, whose batches a process took, in its order."""
    begins = dict(zip((f"stage{i}" for i in range(4)), (0, *workload.ENDS), strict=False))
    return [
        begins[one["stage"]] + one["row"] // workload.BATCH_SIZE + 1
        for one in events
        if "digest" in one
    ]
