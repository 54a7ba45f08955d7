"""Whole runs of a tiny model over random batches: what the tests of loop and checkpoint share.

As a program, `python -m tests.train.fake_run WORKDIR STEP` is a run that kills itself before that
step.
"""

import dataclasses
import io
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console

from alignvlm_jax import storage
from alignvlm_jax.config import Config, MeshConfig, TrainConfig
from alignvlm_jax.data import loader
from alignvlm_jax.data import validation as data_validation
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.errors import UserError
from alignvlm_jax.train import checkpoint_files, loop, state, step
from alignvlm_jax.train.evaluator import Kind
from alignvlm_jax.train.validation import VALIDATION
from tests.conftest import random_batch, tiny_config

NUM_STEPS = 4
TOTAL = 2 * NUM_STEPS
TOKENIZER = {"tokenizer.model": b"words", "chat_format.json": b"{}"}


def stages(mesh: MeshConfig | None = None, **changes) -> tuple[Config, ...]:
    """A text-only stage, then one with pixels whose vision tower is frozen; `changes` are of
    `TrainConfig`."""
    train = TrainConfig(
        num_steps=NUM_STEPS,
        batch_size=8,
        log_every=1,
        validate_every=2,
        validation_sequences=8,
        checkpoint_every=2,
        keep_checkpoints=1,
        max_skipped_steps=1,
    )
    train = dataclasses.replace(train, **changes)
    text = dataclasses.replace(train, visual_source="oracle", trainable=("llm/.*",))
    pixels = dataclasses.replace(train, trainable=("connector/.*", "llm/.*"), load=("llm/.*",))
    mesh = mesh or MeshConfig(data=2, fsdp=2, tensor=2)
    return tiny_config(stage="text", train=text, mesh=mesh), tiny_config(
        stage="pixels", train=pixels, mesh=mesh
    )


class Batches:
    """Stands in for `loader.TrainBatches`: batch i of a stage is a pure function of the stage and
    i.

    `hook(step, batch)` is called before a batch is handed out, with the step of the run that it is
    for.
    """

    def __init__(self, hook: Callable[[int, dict], None] = lambda step, batch: None):
        self._hook = hook
        self.served: list[int] = []

    def __call__(
        self,
        config: Config,
        *,
        start_sequence: int,
        local_rows: list[int],
        schedule_state: dict | None,
        opened: StageData,
    ) -> "Batches":
        assert not schedule_state
        assert local_rows == list(range(config.train.batch_size))
        self._config = config
        self.next_sequence = start_sequence
        self.num_unsupervised = self.num_unused = 0
        return self

    def schedule_state(self) -> dict:
        return {}

    def counters(self, next_sequence: int) -> dict[str, float]:
        return {"records": next_sequence}

    def __next__(self) -> dict:
        index = self.next_sequence // self._config.train.batch_size
        now = index + 1 + (0 if self._config.stage == "text" else NUM_STEPS)
        batch = random_batch(
            self._config, seed=zlib.crc32(f"{self._config.stage}/{index}".encode())
        )
        self._hook(now, batch)
        self.num_unsupervised += now
        self.served.append(now)
        self.next_sequence += self._config.train.batch_size
        return batch


def send(number: signal.Signals, at: int) -> Callable[[int, dict], None]:
    """Returns a hook that sends this process a signal while the batch of step `at` is fetched."""
    return lambda now, batch: os.kill(os.getpid(), number) if now == at else None


class Held:
    """Stands in for `ValidationBatches`."""

    num_records = 3
    num_held = 40

    def __init__(self, batches: Iterable):
        self._batches = batches

    def __iter__(self) -> Iterator:
        return iter(self._batches)


def train(
    workdir: Path,
    batches: Batches | None = None,
    configs: tuple[Config, ...] | None = None,
    validation: Callable[..., list] = lambda config, *_: [random_batch(config, seed=7)],
    kinds: tuple[Kind, ...] = (VALIDATION,),
) -> str:
    """Runs `loop.train` on random batches; returns what it printed.

    UserErrors have that in `printed`.
    """
    console = Console(file=io.StringIO(), soft_wrap=True, width=200)
    with (
        mock.patch.object(loader, "TrainBatches", batches or Batches()),
        mock.patch.object(data_validation, "by_source", lambda config, opened: {"": config}),
        mock.patch.object(
            data_validation, "ValidationBatches", lambda *args: Held(validation(*args))
        ),
        mock.patch.object(loader, "TrainSequences"),
        mock.patch.object(
            StageData, "open", return_value=mock.MagicMock(tokenizer_files=TOKENIZER)
        ),
        mock.patch.object(step, "compile_steps", _compile_steps),
        mock.patch.object(state, "init_params", _init_params),
    ):
        try:
            loop.train(configs or stages(), workdir, console, kinds)
        except UserError as err:
            err.printed = console.file.getvalue()
            raise
    return console.file.getvalue()


def stored(workdir: Path, step: int = TOTAL) -> dict[str, np.ndarray]:
    """Every array of a checkpoint's state by name."""
    tree = ocp.PyTreeCheckpointer().restore(
        storage.absolute(workdir) / "checkpoints" / str(step) / "state"
    )
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def rename(folder: Path, old: int, new: int) -> None:
    """Makes a checkpoint that of another step."""
    (folder / str(old)).rename(folder / str(new))
    path = folder / str(new) / "metadata" / "metadata"
    fields = json.loads(path.read_text())
    del fields[checkpoint_files.CHECKSUM]
    path.write_text(json.dumps(checkpoint_files.with_checksum(fields | {"step": new})))


# Runs of one process share what they compile, and the first draw of parameters: nearly all that
# such a run costs.
_COMPILE_STEPS = step.compile_steps
_INIT_PARAMS = state.init_params
_COMPILED: dict[str, tuple] = {}
_DRAWN: dict[tuple, dict] = {}


def _compile_steps(model, config: Config, *args) -> tuple:
    # Where the data are from is no part of a program.
    data = dataclasses.replace(config.data, dir="", sources={}, tokenizer="")
    key = repr(dataclasses.replace(config, run_id="", stage="", data=data))
    if key not in _COMPILED:
        _COMPILED[key] = _COMPILE_STEPS(model, config, *args)
    return _COMPILED[key]


def _init_params(model, abstract, paths: set[str], rng) -> dict:
    # On another mesh, or of other shapes or dtypes, these are other arrays.
    key = (repr(model.config), repr(abstract), *sorted(paths), int(jax.random.bits(rng)))
    if key not in _DRAWN:
        _DRAWN[key] = _INIT_PARAMS(model, abstract, paths, rng)
    return jax.tree.map(jnp.copy, _DRAWN[key])  # The step will be given these for good.


if __name__ == "__main__":
    train(storage.path(sys.argv[1]), Batches(send(signal.SIGKILL, int(sys.argv[2]))))
