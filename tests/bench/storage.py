"""What a run costs in a bucket 50 ms away: checkpoints and metrics, through the fake server.

python -m tests.bench.storage
"""

import os
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from alignvlm_jax import storage
from alignvlm_jax.train import metrics
from alignvlm_jax.train.checkpoint import Checkpoints
from alignvlm_jax.train.state import TrainState
from tests.bench import machine
from tests.fake_bucket import FakeBucket

LATENCY = 0.05
NUM_ARRAYS = 40


def main() -> None:
    """Prints seconds and requests."""
    table = Table("", "seconds", "requests")
    with FakeBucket() as bucket:
        os.environ.update(bucket.environment())
        workdir = storage.path(bucket.url) / "run"

        def measure(name: str, act) -> None:
            requests = sum(bucket.requests.values())
            began = time.monotonic()
            act()
            table.add_row(
                name,
                f"{time.monotonic() - began:.2f}",
                str(sum(bucket.requests.values()) - requests),
            )

        params = {f"k{i}": np.ones((256, 1024), np.float32) for i in range(NUM_ARRAYS)}
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
        )
        with bucket.faulty(latency=LATENCY), Checkpoints(workdir / "checkpoints") as checkpoints:

            def save(step: int) -> None:
                state = TrainState(np.int32(step), params, ())
                checkpoints.save(
                    step,
                    state,
                    position={"next_sequence": step},
                    metadata={"layout_version": 1},
                    metrics=None,
                )

            save(1)
            checkpoints.wait()
            measure("save: until the next step", lambda: save(2))
            measure("save: until it is whole, and the one before removed", checkpoints.wait)
            measure("restore", lambda: checkpoints.restore_params(2, wanted))
            with metrics.Writer(workdir, 0) as writer:
                lines = range(1000)
                measure(
                    "1,000 lines of metrics",
                    lambda: [writer.write(i, "stage", {"loss": 1.0}) for i in lines],
                )
                measure("all lines and events in the bucket", storage.sync_all)
    Console().print(table)


if __name__ == "__main__":
    with machine.watched():
        main()
