"""Seconds to the first row of a stage over 8 million records, and to the first one of a restart in
its third epoch.

    python -m tests.bench.planning [records]

The data side only: lengths are known, no record is read.
"""

import dataclasses
import json
import resource
import sys
import time

import numpy as np

from alignvlm_jax import presets
from alignvlm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.sampler import Mixed
from tests.bench import machine

CONFIG = Config(
    model=ModelConfig(vision=presets.VISION["tiny"]),
    data=DataConfig(seq_len=8320, max_tiles=24, packing="offline", tasks={"answer": 1.0}),
    train=TrainConfig(num_steps=10**9, batch_size=512),
)


def main(count: int) -> None:
    """Prints the lines that docs/results.md shows."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.lognormal(7.5, 0.6, count), 8320).astype(np.int32)[None]
    known = Lengths(tokens, rng.integers(1, 11, count).astype(np.int16))
    # Without a next epoch: the plan of that one is made while rows are read.
    alone = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=1))
    first = _seconds("start", alone, count, known, 0)
    size = first.epoch_at(0).end
    row = 2 * size + 512
    until_there = dataclasses.replace(
        alone, train=dataclasses.replace(alone.train, num_steps=row // 512)
    )
    before = _seconds(
        "restart in the third epoch, all planned again", until_there, count, known, row
    )
    state = json.loads(json.dumps(before.state())) if hasattr(before, "state") else None
    if state:
        after = _seconds(
            "restart in the third epoch, with the state", until_there, count, known, row, state
        )
        assert after.counters(row) == before.counters(row)
        assert [pick[:2] for pick in after.picks(row)] == [pick[:2] for pick in before.picks(row)]
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def _seconds(
    what: str, config: Config, count: int, known: Lengths, row: int, state: dict | None = None
) -> Mixed:
    begin = time.monotonic()
    num_sequences = config.train.num_steps * config.train.batch_size
    rows = Mixed(config.data, [count], known, [0, 1], num_sequences)
    assert state is None or rows.restore(state)
    rows.counters(row)
    rows.picks(row)
    print(
        f"{count:,} records, {what}: {time.monotonic() - begin:.1f} s to the first row", flush=True
    )
    return rows


if __name__ == "__main__":
    with machine.watched():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 8_000_000)
