"""Seconds and memory to the first row of a stage over many records, and of a second process of the
same host, which maps what the first one planned.

    python -m tests.bench.start_up [records]

Records as of a web crawl: an image each, 60 % of one size, lengths log-normal. The data side only:
the index is there in memory, no record is read.
"""

import multiprocessing
import os
import resource
import sys
import tempfile
import time

import numpy as np

from alignvlm_jax import presets
from alignvlm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from alignvlm_jax.data import lengths
from alignvlm_jax.data.index import Index
from alignvlm_jax.data.sampler import Mixed
from alignvlm_jax.data.tasks import TASKS
from tests.bench import machine

TASK = "answer_and_transcribe"
CONFIG = Config(
    model=ModelConfig(vision=presets.VISION["siglip_so400m_14_384"]),
    data=DataConfig(
        seq_len=18432, max_tiles=20, record_tiles=10, packing="offline", tasks={TASK: 1.0}
    ),
    train=TrainConfig(num_steps=100, batch_size=512),
)


def crawl(count: int) -> Index:
    """Returns the index of `count` records."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(6, 1, count), 8, 60_000).astype(np.int32)
    sizes = rng.integers(200, 3000, (count, 2), dtype=np.int32)
    sizes[rng.random(count) < 0.6] = (1169, 827)
    hashes = rng.integers(0, 2**63, count).astype(np.uint64)
    return Index(
        dict.fromkeys(TASKS, tokens), sizes, np.arange(count + 1, dtype=np.int64), hashes, ""
    )


def main(count: int) -> None:
    """Prints the lines that docs/results.md shows."""
    with tempfile.TemporaryDirectory() as folder:
        # Where the processes of a host look for each other's plans: nothing of an earlier run.
        os.environ["TMPDIR"] = folder
        # A process each: the peak of one says nothing about the other.
        context = multiprocessing.get_context("spawn")
        for what in ("plans", "maps the plan"):
            process = context.Process(target=_start, args=(what, count))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)


def _start(what: str, count: int) -> None:
    index = crawl(count)
    of_index = _peak()
    begin, cpu = time.monotonic(), time.process_time()
    limits = lengths.Limits.of(CONFIG.data, CONFIG.model.vision, CONFIG.model.tokens_per_tile)
    known = lengths._measured((index,), (TASK,), limits)
    num_sequences = CONFIG.train.num_steps * CONFIG.train.batch_size
    rows = Mixed(CONFIG.data, [count], known, [0, 1], num_sequences)
    rows.picks(0)
    efficiency = rows.counters(10_000)["packing_efficiency"]
    print(
        f"{count:,} records, {what}: {time.monotonic() - begin:.1f} s to the first row, "
        f"{time.process_time() - cpu:.1f} s of CPU; {_peak() - of_index:.0f} MiB beside the "
        f"index's {of_index:.0f}; packing efficiency {efficiency:.1%}",
        flush=True,
    )


def _peak() -> float:
    """Returns the most memory that this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    with machine.watched():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000_000)
