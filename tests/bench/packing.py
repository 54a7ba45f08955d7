"""Plans of large mixes: time, memory, and how full rows are, beside packing in order and padding to
the longest.

python -m tests.bench.packing            (make bench; a minute)
"""

import multiprocessing
import time
from pathlib import Path

import numpy as np

from alignvlm_jax.commands import config_flag
from alignvlm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from alignvlm_jax.data import lengths as lengths_lib
from alignvlm_jax.data import mixture, packing
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.loader import TrainSequences
from alignvlm_jax.data.sampler import Mixed
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.presets import LLM, VISION
from alignvlm_jax.train.metrics import peak_memory_gib
from tests.bench import machine

NUM_RECORDS = 8_100_000  # CC-12M, as the paper's first stage has it
SEQ_LEN = 8192
MAX_TILES = 11
PATCHES = 729
BATCH_SIZE = 32
NUM_EPOCHS = 5


def texts(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal lengths without images: half of them below 245 tokens, one in a hundred above
    2,500."""
    return rng.lognormal(5.5, 1.0, count).astype(np.int32).clip(1, SEQ_LEN), np.zeros(
        count, np.int16
    )


def captions(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of one tile and a log-normal text of 90 tokens."""
    lengths = rng.lognormal(4.5, 1.0, count).astype(np.int32).clip(1, 2000) + PATCHES
    return lengths, np.ones(count, np.int16)


def documents(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pages of one to ten tiles and a log-normal text of 245 tokens."""
    tiles = rng.choice(
        [1, 2, 3, 4, 5, 7, 10], count, p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.05]
    ).astype(np.int16)
    lengths = rng.lognormal(5.5, 1.0, count).astype(np.int32).clip(1, 900) + tiles * PATCHES
    return lengths, tiles


MIXES = {
    "log-normal texts": texts,
    "captions, one tile": captions,
    "documents, one to ten tiles": documents,
}


def main() -> None:
    """Prints the tables that docs/results.md shows."""
    print(
        f"| rows of {SEQ_LEN} tokens and {MAX_TILES} tiles, 1,000,000 records: fill | plan | "
        "in order | padded |"
    )
    print("|---|---|---|---|")
    for name, make in MIXES.items():
        lengths, tiles = make(1_000_000, np.random.default_rng(0))
        plan = packing.plan(lengths, tiles, SEQ_LEN, MAX_TILES, [0], 0)
        planned = lengths.sum() / (SEQ_LEN * (len(plan.offsets) - 1))
        beside = in_order(lengths, tiles, SEQ_LEN, MAX_TILES), padded(lengths)
        print(f"| {name} | {planned:.1%} | {beside[0]:.1%} | {beside[1]:.1%} |", flush=True)
    print_real()
    print(
        f"\n| {NUM_RECORDS:,} records | seconds | peak memory of the process, GiB |\n|---|---|---|"
    )
    context = multiprocessing.get_context("spawn")
    for name, measure in (
        ("the plan alone", measure_plan),
        ("an epoch: mixture, tasks, plan", measure_epoch),
    ):
        with context.Pool(1) as pool:
            seconds, gib = pool.apply(measure)
        print(f"| {name} | {seconds:.1f} | {gib:.2f} |", flush=True)


def print_real() -> None:
    """The stages of configs/documents.py on Debian's manual, where `make data` has been called."""
    if not Path("data/debian/prepare.json").exists():
        print("\nno table of real pages: `make data` makes them")
        return
    stages, _ = config_flag.parse(["--config=configs/documents.py"])
    print(
        f"\n| Debian's manual, the first {NUM_EPOCHS} epochs: fill | rows of | plan | in order | "
        "padded |"
    )
    print("|---|---|---|---|---|")
    for config in stages:
        data = config.data
        rows = TrainSequences(config, "train").schedule
        opened = StageData.open(data, config.model)
        tasks, _ = mixture.task_fractions(data.tasks)
        limits = lengths_lib.Limits.of(data, config.model.vision, config.tokens_per_tile)
        sizes = [len(opened.records(data.dir, "train"))]
        known = lengths_lib.load(opened, [data.dir], "train", tasks, sizes, limits)
        epochs = [rows.epoch_at(0)]
        while len(epochs) < NUM_EPOCHS:
            epochs.append(rows.epoch_at(epochs[-1].end))
        lengths = np.concatenate([epoch.tokens for epoch in epochs])
        tiles = np.concatenate([known.tiles[epoch.records] for epoch in epochs])
        fills = (
            rows.counters(epochs[-1].end)["packing_efficiency"],
            in_order(lengths, tiles, data.seq_len, data.max_tiles),
        )
        shown = [f"{fill:.1%}" for fill in (*fills, padded(lengths))]
        print(
            f"| {config.stage}: {', '.join(data.tasks)} | {data.seq_len:,} | {' | '.join(shown)} |"
        )


def in_order(lengths: np.ndarray, tiles: np.ndarray, seq_len: int, max_tiles: int) -> float:
    """Fill of rows that are closed by the first record that does not fit."""
    rows = 1
    room = seq_len
    tiles_left = max_tiles
    for length, num_tiles in zip(lengths.tolist(), tiles.tolist(), strict=True):
        if length > room or num_tiles > tiles_left:
            rows = rows + 1
            room = seq_len
            tiles_left = max_tiles
        room = room - length
        tiles_left = tiles_left - num_tiles
    return lengths.sum() / (rows * seq_len)


def padded(lengths: np.ndarray) -> float:
    """Fill of batches of a record a row, as long as the longest of them."""
    batches = lengths[: len(lengths) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    return batches.sum() / (batches.max(axis=1).sum() * BATCH_SIZE)


def measure_plan() -> tuple[float, float]:
    """Seconds, and GiB with the lengths in memory."""
    lengths, tiles = documents(NUM_RECORDS, np.random.default_rng(0))
    began = time.monotonic()
    packing.plan(lengths, tiles, SEQ_LEN, MAX_TILES, [0], 0)
    return time.monotonic() - began, peak_memory_gib()


def measure_epoch() -> tuple[float, float]:
    """As a training process makes it, with two tasks to draw from."""
    model = ModelConfig(vision=VISION["siglip_so400m_14_384"], llm=LLM["llama32_1b"])
    data = DataConfig(
        packing="offline",
        seq_len=SEQ_LEN,
        max_tiles=MAX_TILES,
        tasks={"transcribe": 0.5, "answer": 0.5},
    )
    config = Config(model=model, data=data, train=TrainConfig(num_steps=1000, batch_size=32))
    lengths, tiles = documents(NUM_RECORDS, np.random.default_rng(0))
    known = Lengths(np.stack([lengths, lengths]), tiles)
    began = time.monotonic()
    num_sequences = config.train.num_steps * config.train.batch_size
    Mixed(config.data, [NUM_RECORDS], known, [0, 1], num_sequences).epoch_at(0)
    return time.monotonic() - began, peak_memory_gib()


if __name__ == "__main__":
    with machine.watched():
        main()
