"""Plans of large mixes: time, memory, and how full rows are, beside packing in order and padding to the longest.

python -m tests.benchmarks.packing            (make bench; a minute)
"""

import multiprocessing
import time

import numpy as np

from alignvlm_jax.config import Config, DataConfig, ModelConfig
from alignvlm_jax.data import packing
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.schedule import Mixed
from alignvlm_jax.presets import LLM, VISION
from alignvlm_jax.train.metrics import peak_memory_gib

NUM_RECORDS = 8_100_000  # CC-12M, as the paper's first stage has it
ROW_LENGTH, ROW_TILES, PATCHES = 8192, 11, 729
BATCH_SIZE = 32


def texts(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal lengths without images: half of them below 245 tokens, one in a hundred above 2,500."""
    lengths = (
        rng.lognormal(
            5.5,
            1.0,
            count,
        )
        .astype(np.int32)
        .clip(1, ROW_LENGTH)
    )
    return lengths, np.zeros(count, np.int16)


def captions(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image of one tile and a log-normal text of 90 tokens."""
    lengths = rng.lognormal(4.5, 1.0, count).astype(np.int32).clip(1, 2000) + PATCHES
    return lengths, np.ones(count, np.int16)


def documents(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pages of one to ten tiles and a log-normal text of 245 tokens."""
    tiles = rng.choice([1, 2, 3, 4, 5, 7, 10], count, p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.05]).astype(np.int16)
    lengths = rng.lognormal(5.5, 1.0, count).astype(np.int32).clip(1, 900) + tiles * PATCHES
    return lengths, tiles


MIXES = {"log-normal texts": texts, "captions, one tile": captions, "documents, one to ten tiles": documents}


def main() -> None:
    """Prints the tables that docs/results.md shows."""
    print(f"| rows of {ROW_LENGTH} tokens and {ROW_TILES} tiles, 1,000,000 records: fill | plan | in order | padded |")
    print("|---|---|---|---|")
    for name, make in MIXES.items():
        lengths, tiles = make(1_000_000, np.random.default_rng(0))
        plan = packing.plan(lengths, tiles, ROW_LENGTH, ROW_TILES, [0], 0)
        planned = lengths.sum() / (ROW_LENGTH * (len(plan.offsets) - 1))
        print(f"| {name} | {planned:.1%} | {in_order(lengths, tiles):.1%} | {padded(lengths):.1%} |", flush=True)
    print(f"\n| {NUM_RECORDS:,} records | seconds | peak memory of the process, GiB |\n|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name, measure in (("the plan alone", measure_plan), ("an epoch: mixture, tasks, plan", measure_epoch)):
        with context.Pool(1) as pool:
            seconds, gib = pool.apply(measure)
        print(f"| {name} | {seconds:.1f} | {gib:.2f} |", flush=True)


def in_order(lengths: np.ndarray, tiles: np.ndarray) -> float:
    """Fill of rows that are closed by the first record that does not fit."""
    rows, room, tiles_left = 1, ROW_LENGTH, ROW_TILES
    for length, num_tiles in zip(lengths.tolist(), tiles.tolist(), strict=True):
        if length > room or num_tiles > tiles_left:
            rows, room, tiles_left = rows + 1, ROW_LENGTH, ROW_TILES
        room, tiles_left = room - length, tiles_left - num_tiles
    return lengths.sum() / (rows * ROW_LENGTH)


def padded(lengths: np.ndarray) -> float:
    """Fill of batches of a record a row, as long as the longest of them."""
    batches = lengths[: len(lengths) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    return batches.sum() / (batches.max(axis=1).sum() * BATCH_SIZE)


def measure_plan() -> tuple[float, float]:
    """Seconds, and GiB with the lengths in memory."""
    lengths, tiles = documents(NUM_RECORDS, np.random.default_rng(0))
    began = time.monotonic()
    packing.plan(lengths, tiles, ROW_LENGTH, ROW_TILES, [0], 0)
    return time.monotonic() - began, peak_memory_gib()


def measure_epoch() -> tuple[float, float]:
    """As a training process makes it, with two tasks to draw from."""
    model = ModelConfig(vision=VISION["siglip_so400m_14_384"], llm=LLM["llama32_1b"])
    config = Config(model=model, data=DataConfig(packing="plan", row_length=ROW_LENGTH, max_tiles=ROW_TILES))
    lengths, tiles = documents(NUM_RECORDS, np.random.default_rng(0))
    known = Lengths(np.stack([lengths, lengths]), tiles)
    began = time.monotonic()
    Mixed(config, [NUM_RECORDS], known, [0, 1]).epoch_at(0)
    return time.monotonic() - began, peak_memory_gib()


if __name__ == "__main__":
    main()
