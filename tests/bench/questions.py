"""Questions answered a second on CPU: continuous batching, as `evaluate` works, against batches that
are padded to the longest prompt and go on until the last answer has ended.

    make bench-questions CHECKPOINT=runs/demo

The questions are mixed ones, then as many of the checkpoint's first split. Mixed are random tokens,
prompts of 8 tokens to all that the model was trained on (256 at most), with no page or with one of
noise, and answers that end at every tenth token of the vocabulary. The answers must be the same.
In turns, compiling left out; CPU seconds of the process beside, for machines that others use.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from alignvlm_jax.benchmarks import questions
from alignvlm_jax.data import loader, shards
from alignvlm_jax.data.sequences import PackedSequence
from alignvlm_jax.inference import batching, loading
from alignvlm_jax.inference.batching import Prompts
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.inference.sampler import Sampler

COUNT = 500
ROUNDS = 3
LONGEST = 256
NUM_NEW = 32


def main() -> None:
    """Prints the table that docs/results.md shows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    loaded = loading.load(args.checkpoint, loading.load_config(args.checkpoint))
    vocab_size = loaded.config.model.llm.unpadded_vocab_size
    kinds = {"mixed": (mixed(loaded, args.count), tuple(range(0, vocab_size, 10)))}
    if Path(loaded.config.data.dir).is_dir():
        kinds["of a split"] = (of_split(loaded, args.count), None)
    print(
        f"{args.count} questions, {args.rows} rows, up to {NUM_NEW} new tokens; median of {ROUNDS}\n\n"
        "| questions | tokens of prompts | padded batches, questions a second | continuous | ratio "
        "| ratio of CPU seconds | programs |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name, (prompts, ends) in kinds.items():
        lengths = [int(prompt["segment_ids"].sum()) for prompt in prompts]
        sampler = loaded.sampler(ends)
        padded, continuous = race(
            functools.partial(in_batches, loaded, loaded.sampler(ends), prompts, args.rows),
            functools.partial(in_turns, loaded, sampler, prompts, args.rows),
        )
        rates = [args.count / seconds for seconds, _ in (padded, continuous)]
        print(
            f"| {name} | {min(lengths)} to {max(lengths)} | {rates[0]:.1f} | {rates[1]:.1f} | "
            f"{rates[1] / rates[0]:.2f} | {padded[1] / continuous[1]:.2f} | "
            f"{sampler.num_programs} |",
            flush=True,
        )


def of_split(loaded: Loaded, count: int) -> list[PackedSequence]:
    """The questions that `evaluate` asks."""
    config = loaded.config
    records = shards.RecordSource(config.data.dir, config.eval.splits[0])
    return [
        loaded.builder.prompt(records[one.record], one.chat_turn(), one.before)
        for one in questions.choose_questions(records, count)
    ]


def mixed(loaded: Loaded, count: int) -> list[PackedSequence]:
    """Random prompts; a page has one tile more than the last, up to all of a record."""
    rng = np.random.default_rng(0)
    builder = loaded.builder
    vision = loaded.config.model.vision
    length = min(builder.data.seq_len, LONGEST)
    per_tile = builder.tokens_per_prompt_tile
    most_tiles = min(builder.data.tiles_of_a_record, (length - 8) // per_tile)
    shape = (most_tiles, vision.tile_height, vision.tile_width, 3)
    prompts = []
    for number in range(count):
        slots = number % (most_tiles + 1) * per_tile
        is_token = np.arange(length) < rng.integers(slots + 8, length + 1)
        tokens = rng.integers(5, loaded.config.model.llm.unpadded_vocab_size, length)
        tokens[tokens == builder.image_token_id] = 5
        tokens[:slots] = builder.image_token_id
        prompts.append(
            {
                "tokens": np.where(is_token, tokens, loaded.tokenizer.pad_id).astype(np.int32),
                "positions": np.where(is_token, np.arange(length), 0).astype(np.int32),
                "segment_ids": is_token.astype(np.int32),
            }
            | ({"tiles": rng.integers(0, 256, shape, dtype=np.uint8)} if most_tiles else {})
        )
    return prompts


def in_batches(
    loaded: Loaded, sampler: Sampler, prompts: list[PackedSequence], rows: int
) -> list[str]:
    """One batch after another, all of one shape."""
    same = loaded.builder.trim_prompts(prompts)
    texts = []
    for start in range(0, len(same), rows):
        numbers = np.minimum(np.arange(start, start + rows), len(same) - 1).tolist()
        batch = loader.stack([same[number] for number in numbers])
        tokens_BT = sampler.generate(loaded.variables, batch, NUM_NEW)
        texts += [loaded.tokenizer.decode(tokens) for tokens in tokens_BT[: len(same) - start]]
    return texts


def in_turns(
    loaded: Loaded, sampler: Sampler, prompts: list[PackedSequence], rows: int
) -> list[str]:
    """As `evaluate` works."""
    length, _ = loaded.builder.extent(prompts)
    longest = loaded.config.longest_context
    of_all = Prompts(len(prompts), loaded.builder, prompts.__getitem__, length, longest)
    found = batching.answer(sampler, loaded.variables, loaded.tokenizer, of_all, rows, NUM_NEW)
    return [one.text for one in found]


def race(*runs: Callable[[], list[str]]) -> list[tuple[float, float]]:
    """Seconds and CPU seconds of each, the medians of ROUNDS in turns, once all have been seen to
    return the same."""
    first, *others = (run() for run in runs)
    for other in others:
        assert other == first, f"{sum(map(str.__ne__, first, other))} answers differ"
    seconds = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, times in zip(runs, seconds, strict=True):
            began = time.perf_counter(), time.process_time()
            run()
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return [tuple(map(statistics.median, zip(*times, strict=True))) for times in seconds]


if __name__ == "__main__":
    print(f"jax {jax.__version__}", flush=True)
    main()
