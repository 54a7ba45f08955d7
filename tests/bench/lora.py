"""Optimizer memory and seconds of a training step with LoRA, beside those of full training, in one
process and in turns, on the CPU.

    python -m tests.bench.lora WEIGHTS DATA [ROUNDS]

WEIGHTS is a folder that `convert` wrote, DATA one that `prepare` wrote. The models are those of
WEIGHTS with pages of one tile, two sequences a step and nothing rematerialised.
"""

import dataclasses
import pathlib
import sys
import time

import jax
import numpy as np

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import LoraConfig
from alignvlm_jax.data import loader
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import optim, restore, state, step, warm_start
from tests.bench import machine

LORA = LoraConfig(rank=16)
VARIANTS = {
    "full training": ((".*",), LoraConfig()),
    "LoRA, and the connector": (("connector/.*",), LORA),
    "LoRA alone": ((), LORA),
}
TEXT = 64  # Tokens beside those of the image.


def main(weights: pathlib.Path, data: str, rounds: int) -> None:
    """Prints a row for each of VARIANTS."""
    base = restore.load_config(weights)
    fields = dataclasses.replace(
        base.data,
        dir=data,
        max_tiles=1,
        use_overview=False,
        seq_len=base.model.tokens_per_tile + TEXT,
    )
    train = dataclasses.replace(base.train, num_steps=100, batch_size=2, patch_token_weight=0.0)
    base = dataclasses.replace(base, data=fields, mesh=config_lib.MeshConfig(data=1), train=train)
    opened = StageData.open(base.data, base.model)
    batches = loader.TrainBatches(
        base, start_sequence=0, local_rows=[0, 1], schedule_state=None, opened=opened
    )
    with mesh_lib.use(mesh_lib.single_device()) as mesh:
        batch = sharding.put_batch(step.train_inputs(base.train, next(batches)), mesh)
        runs = {name: Run(base, weights, *found, mesh) for name, found in VARIANTS.items()}
        for _ in range(rounds):
            for run in runs.values():
                run.step(batch)
    full = np.median(runs["full training"].seconds)
    for name, run in runs.items():
        seconds = np.median(run.seconds)
        print(
            f"| {name} | {run.num_trained:,} | {run.optimizer_bytes:,} | {seconds:.2f} | "
            f"{seconds / full:.2f} |",
            flush=True,
        )


class Run:
    """A state that is trained and what its steps take; the first, which warms up, is not counted."""

    def __init__(self, base, weights, trainable, lora, mesh):
        train = dataclasses.replace(base.train, trainable=trainable)
        config = dataclasses.replace(base, train=train, lora=lora)
        model = vlm.VLM(config.model)
        tx = optim.make_optimizer(config.optim, train.num_steps)
        abstract = state.abstract_state(model, train, tx, mesh, lora)
        found = restore.read_newest(
            weights, lambda source, n: warm_start.read(train, abstract, source, n, lora)
        )
        params, _ = warm_start.start_params(model, abstract, found, jax.random.key(0))
        trained = state.trainable_paths(train, config.stage, abstract.params)
        opt_state = state.init_opt_state(tx, trained, abstract, params)
        zero = jax.device_put(np.int32(0), abstract.step.sharding)
        self.live = state.TrainState(zero, params, opt_state)
        self.num_trained = sum(state.flatten(params)[path].size for path in trained)
        self.optimizer_bytes = sum(x.nbytes for x in jax.tree.leaves(opt_state) if x.ndim)
        self.compiled = step.lower_train_step(model, config, tx, abstract, mesh).compile()
        self.seconds: list[float] = []
        self.is_warm = False

    def step(self, batch) -> None:
        """Takes a step."""
        began = time.monotonic()
        self.live, metrics = self.compiled(self.live, batch)
        assert np.isfinite(float(metrics["loss"]))
        if self.is_warm:
            self.seconds.append(time.monotonic() - began)
        self.is_warm = True


if __name__ == "__main__":
    with machine.watched():
        main(pathlib.Path(sys.argv[1]), sys.argv[2], int((*sys.argv[3:], 5)[0]))
