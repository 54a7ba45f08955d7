"""Plans of large mixes: time, memory, and how full rows are, beside packing in order and padding to
the longest.

python -m tests.bench.packing            (make bench; a minute)
python -m tests.bench.packing stages     the paper's stages, before and after, alone
"""

import dataclasses
import multiprocessing
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignvlm_jax.commands import config_flag
from alignvlm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from alignvlm_jax.data import lengths as lengths_lib
from alignvlm_jax.data import mixture, packing
from alignvlm_jax.data.lengths import Lengths
from alignvlm_jax.data.loader import TrainSequences
from alignvlm_jax.data.sampler import Mixed
from alignvlm_jax.data.stage_data import StageData
from alignvlm_jax.models import vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.plan import flops
from alignvlm_jax.presets import LLM, VISION
from alignvlm_jax.train import state
from alignvlm_jax.train.metrics import peak_memory_gib
from tests import paper_data
from tests.bench import machine
from tests.paper_data import Padding

NUM_RECORDS = 8_100_000  # CC-12M, as the paper's first stage has it
ALL_RECORDS = 12_400_000  # and all of it
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


def main(args: list[str]) -> None:
    """Prints the tables that docs/results.md shows."""
    print_stages()
    if args == ["stages"]:
        return
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
        (f"an epoch of stage1.py, {ALL_RECORDS:,} records", measure_stage),
    ):
        with context.Pool(1) as pool:
            seconds, gib = pool.apply(measure)
        print(f"| {name} | {seconds:.1f} | {gib:.2f} |", flush=True)


OTHER_SIZES = {"": (1.0, 1.0), "images x 0.7": (0.7, 1.0), "images x 1.4": (1.4, 1.0)} | {
    "texts x 1.5": (1.0, 1.5)
}
"""Factors of sides of images and of lengths of texts."""


class Cost(NamedTuple):
    """FLOPs of a training step for each tile, for each token, and in attention for the square of
    the tokens that are read together."""

    tile: float
    token: float
    square: float

    def of(self, num_tiles: float, num_tokens: float, squares: float) -> float:
        return num_tiles * self.tile + num_tokens * self.token + squares * self.square


def print_stages() -> None:
    """Padding of the paper's stages as they are and with a record a sequence, which has room for
    ten tiles and the paper's text length."""
    print(
        "| | records a sequence | padding of tokens, tiles, FLOPs of 1B and 8B | before | "
        "records a second, 1B and 8B |\n|---|---|---|---|---|"
    )
    costs: dict[str, list[Cost]] = {}
    for data in paper_data.DATA:
        name = data.partition(",")[0]
        if name not in costs:
            costs[name] = [cost_of(f"{name}.py:{llm}") for llm in ("llama32_1b", "llama31_8b")]
        for sizes, factors in OTHER_SIZES.items():
            records = paper_data.draw(data, 100_000, *factors)
            packed = load_stage(f"{name}.py:llama32_1b")
            alone = unpacked(packed)
            now, before = (paper_data.padding(one, records) for one in (packed, alone))
            useful = [used(cost, alone, before) for cost in costs[name]]
            cells = []
            spent = []
            for config, one in ((packed, now), (alone, before)):
                total = [computed(cost, config, one) for cost in costs[name]]
                spent.append(total)
                idle = [1 - a / b for a, b in zip(useful, total, strict=True)]
                cells.append(", ".join(f"{x:.1%}" for x in (one.tokens, one.tiles, *idle)))
            faster = ", ".join(f"x {b / a:.2f}" for a, b in zip(*spent, strict=True))
            label = f"{data}; {sizes}" if sizes else data
            print(
                f"| {label} | {now.records_per_sequence:.2f} | {' | '.join(cells)} | {faster} |",
                flush=True,
            )


def load_stage(name: str) -> Config:
    """Returns one of the paper's stages."""
    [config], _ = config_flag.parse([f"--config=configs/{name}"])
    return config


def unpacked(config: Config) -> Config:
    """Returns a stage of the paper with a record a sequence."""
    text_length = 1024 if config.stage == "stage1" else 2048
    seq_len = -(-(10 * PATCHES + text_length) // 128) * 128
    data = dataclasses.replace(config.data, packing="none", seq_len=seq_len, max_tiles=10)
    return dataclasses.replace(config, data=data)


def cost_of(name: str) -> Cost:
    """Returns what a stage's step computes, from the FLOPs of sequences of four sizes."""
    config = load_stage(name)
    train = dataclasses.replace(config.train, batch_size=1)
    mesh = mesh_lib.abstract(config.mesh, config.model, config.train, 1)
    params = state.abstract_params(vlm.VLM(config.model), mesh)

    def step(seq_len: int, max_tiles: int) -> float:
        data = dataclasses.replace(config.data, seq_len=seq_len, max_tiles=max_tiles)
        shaped = dataclasses.replace(config, data=data, train=train)
        return sum(flops.step_flops(shaped, params).values())

    tile = step(8192, 2) - step(8192, 1)
    short, long = (step(length, 1) - tile for length in (4096, 8192))
    # Of T tokens it is T * token + T**2 * square.
    square = (long / 8192 - short / 4096) / 4096
    return Cost(tile, short / 4096 - 4096 * square, square)


def computed(cost: Cost, config: Config, padding: Padding) -> float:
    """FLOPs of an epoch, with padding."""
    seq_len = config.data.seq_len
    return padding.rows * cost.of(config.data.max_tiles, seq_len, seq_len**2)


def used(cost: Cost, config: Config, padding: Padding) -> float:
    """FLOPs of an epoch's own tiles and tokens, which are read together with their record's."""
    tokens = padding.lengths.astype(float)
    num_tiles = (1 - padding.tiles) * padding.rows * config.data.max_tiles
    return cost.of(num_tiles, tokens.sum(), (tokens**2).sum())


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


def measure_stage() -> tuple[float, float]:
    """As a training process makes the first epoch of the paper's stage 1."""
    config = load_stage("stage1.py:llama32_1b")
    million = paper_data.draw("stage1", 1_000_000)
    limits = lengths_lib.Limits.of(config.data, config.model.vision, config.tokens_per_tile)
    found = lengths_lib.measure(million, ["answer"], limits)
    places = np.arange(ALL_RECORDS) % len(million)
    known = Lengths(found.tokens[:, places], found.tiles[places])
    del million, found, places
    began = time.monotonic()
    Mixed(config.data, [ALL_RECORDS], known, [0, 1], 1).epoch_at(0)
    return time.monotonic() - began, peak_memory_gib()


if __name__ == "__main__":
    with machine.watched():
        main(sys.argv[1:])
