"""Seconds to open data in a bucket, and records a second from it, where every request waits 50 ms.

    python -m tests.bench.bucket_data

A fake Cloud Storage server runs on this machine; 1 GB of memory.
"""

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from alignvlm_jax.data import filesystem, index, shards
from alignvlm_jax.data.read_ahead import ReadAhead
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.tasks import TASKS
from tests.bench import machine
from tests.fake_bucket import FakeBucket

SHARDS = int(os.environ.get("SHARDS", 4000))
RECORDS = 20
RECORD_BYTES = 2000
LATENCY = 0.05
READS = 3000


def main() -> None:
    """Prints the lines that docs/results.md shows."""
    with tempfile.TemporaryDirectory() as folder, _serving(Path(folder)) as (url, ask):
        for name in ("a shard", "of all"):
            if name == "of all":
                ask("merged")
                filesystem._remote_listing.cache_clear()
            begin = time.monotonic()
            before = ask("requests")
            source = shards.RecordSource(url, "train")
            opened = time.monotonic() - begin
            assert len(index.load(url, "train")) == len(source) == SHARDS * RECORDS
            print(
                f"{SHARDS} shards, one index {name}: shards {opened:.1f} s, "
                f"index {time.monotonic() - begin - opened:.1f} s, {ask('requests') - before} "
                "requests",
                flush=True,
            )
        order = np.random.default_rng(0).permutation(len(source))[:READS].tolist()
        for ahead in (False, True):
            reads = order if ahead else order[:60]
            begin = time.monotonic()
            used = time.process_time()
            reading = ReadAhead(_Rows(source), len(reads), lambda i: order[i]) if ahead else None
            for number, record in enumerate(reads):
                if reading:
                    reading.go_on(number)
                source[record]
            rate = len(reads) / (time.monotonic() - begin)
            work = (time.process_time() - used) / len(reads) * 1000
            print(
                f"one reader, {'read ahead' if ahead else 'each when asked for'}: {rate:.0f} "
                f"records a second, {work:.1f} ms of CPU a record"
            )


class _Rows:
    """A record a row."""

    def __init__(self, source: shards.RecordSource):
        self._source = source

    def prefetch(self, index: int) -> int:
        self._source.prefetch(index)
        return 1


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, Callable[[str], int]]]:
    """In another process, as the server's Python must not take this one's time."""
    _write(folder)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(str(folder), theirs), daemon=True
    )
    server.start()
    url, environment = ours.recv()
    os.environ.update(environment)

    def ask(what: str) -> int:
        ours.send(what)
        return ours.recv()

    try:
        yield f"{url}/data", ask
    finally:
        ours.send("end")
        server.join()


def _serve(folder: str, connection: Connection) -> None:
    with FakeBucket() as bucket:
        paths = list(Path(folder).iterdir())
        for path in paths:
            if path.name.startswith("train"):
                bucket.put(f"data/{path.name}", path.read_bytes())
        bucket.faults.latency = LATENCY
        connection.send((bucket.url, bucket.environment()))
        while (asked := connection.recv()) != "end":
            for path in paths if asked == "merged" else ():
                if not path.name.startswith("train"):
                    bucket.put(f"data/{path.name}", path.read_bytes())
            connection.send(sum(bucket.requests.values()))


def _write(folder: Path) -> None:
    rng = np.random.default_rng(0)
    counted = index.Index(
        {task: np.full(RECORDS, 50, np.int32) for task in TASKS},
        np.full((RECORDS, 2), 100, np.int32),
        np.arange(RECORDS + 1),
        np.zeros(RECORDS, np.uint64),
        "f",
    )
    for shard in range(SHARDS):
        path = folder / shards.shard_name("train", shard, SHARDS)
        shards.write_shard(
            path, (Record(str(i), "test", (rng.bytes(RECORD_BYTES),), ()) for i in range(RECORDS))
        )
        index.write(index.index_path(path), counted)
    index.merge(folder, "train")


if __name__ == "__main__":
    with machine.watched():
        print(f"{filesystem.THREADS} requests at a time, {LATENCY * 1000:.0f} ms each")
        main()
