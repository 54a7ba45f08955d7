"""Our parts of `tests.bench.gpu`, each in a process of its own; a line of JSON for each thing
measured."""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignvlm_jax.commands import config_flag
from alignvlm_jax.config import Config, DataConfig, MeshConfig
from alignvlm_jax.inference import sampler
from alignvlm_jax.models import vlm
from alignvlm_jax.ops.attention import self_attention
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import flops
from alignvlm_jax.train import optim, state
from alignvlm_jax.train import step as step_lib
from tests.bench import training_ours
from tests.bench.gpu import LOSSES, ROWS, STEPS, report, speed

GIB = 2**30
NUM_DOCUMENTS = 3  # in a row
NUM_PADDING = 0.01  # of a row
QUESTION = 64  # tokens of a prompt beside those of its page
NUM_NEW = 128
BATCH_SIZES = (1, 8, 32)
# Half of all pairs, two matmuls forward and five backward, of which each pair takes 2 h FLOPs.
ATTENTION_MATMULS = 7


def config_of(small: bool, kernel: str, dtype: str = "bfloat16") -> Config:
    """Returns stage 2 of 1B with rows as long as the paper's, or a tiny model, with every layer
    rematerialised, and a constant learning rate."""
    if small:
        base = training_ours.config_of("tiny", "align")
        base = dataclasses.replace(base, data=DataConfig(seq_len=64, max_tiles=4))
    else:
        (base,), _ = config_flag.parse(["--config=stage2:llama32_1b"])
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, attention=kernel, dtype=dtype, remat="full", vocab_impl="auto"
        ),
        optim=training_ours.OPTIM,
        train=dataclasses.replace(
            base.train, batch_size=ROWS, num_steps=1000, grad_accum_steps=1, patch_token_weight=0.0
        ),
        mesh=MeshConfig(data=1),
    )


def packed_batch(config: Config) -> dict[str, np.ndarray]:
    """Rows of NUM_DOCUMENTS, the tiles of each before its random text, whose every token is
    predicted, and some padding."""
    rng = np.random.default_rng(0)
    shapes = vlm.abstract_batch(config.model, config.data, config.train.batch_size)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    length = config.data.seq_len
    tiles = _parts(config.data.max_tiles)
    num_image = config.data.max_tiles * config.model.tokens_per_tile
    texts = _parts(length - num_image - max(1, int(NUM_PADDING * length)))
    at = 0
    for document, (num_tiles, text) in enumerate(zip(tiles, texts, strict=True), 1):
        begin = at + num_tiles * config.model.tokens_per_tile
        end = begin + text
        batch["tokens"][:, at:begin] = config.model.image_token_id
        for name in ("tokens", "targets"):
            drawn = rng.integers(0, config.model.llm.vocab_size, (ROWS, text), np.int32)
            batch[name][:, begin:end] = drawn
        batch["loss_weights"][:, begin:end] = 1
        batch["positions"][:, at:end] = np.arange(end - at)
        batch["segment_ids"][:, at:end] = document
        at = end
    batch["positions"][:, at:] = np.arange(length - at)
    batch["tiles"] = rng.integers(0, 256, batch["tiles"].shape, np.uint8)
    return batch


def _parts(count: int) -> list[int]:
    return [len(part) for part in np.array_split(np.arange(count), NUM_DOCUMENTS)]


def device(small: bool) -> None:
    """Says which GPU there is.

    Raises:
      SystemExit: there is none, in one line.
    """
    try:
        found = jax.devices()[0]
    except (RuntimeError, AssertionError) as err:  # No driver; no plugin of jax for CUDA.
        reason = (str(err) or "requirements-gpu.txt is not installed").splitlines()[0]
        raise SystemExit(
            f"jax finds no NVIDIA GPU: {reason}; --small runs the parts on CPU"
        ) from None
    peak = flops.peak_flops([found])
    report(
        kind=found.device_kind,
        peak_tflops=peak and peak / 1e12,
        jax=jax.__version__,
        python=sys.version.split()[0],
        rows=ROWS,
        seq_len=config_of(small, "xla").data.seq_len,
    )


def attention(small: bool) -> None:
    """Times attention's kernels on a packed row as long as the paper's, forward and backward, and
    holds them against XLA's in float32."""
    config = config_of(small, "xla")
    llm = config.model.llm
    shape = (ROWS, config.data.seq_len)
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal((*shape, heads, llm.head_dim), np.float32), jnp.bfloat16)
        for heads in (llm.num_heads, llm.num_kv_heads, llm.num_kv_heads, llm.num_heads)
    ]
    segment_ids = jnp.asarray(packed_batch(config)["segment_ids"])
    pairs = ROWS * llm.num_heads * config.data.seq_len**2 / 2
    work = ATTENTION_MATMULS * pairs * 2 * llm.head_dim
    with mesh_lib.use(mesh_lib.single_device()):
        exact = _with_gradients("xla")(*(x.astype(jnp.float32) for x in arrays), segment_ids)
        for kernel in ("xla", "triton") if small else ("triton", "cudnn", "xla"):
            try:
                compiled = _with_gradients(kernel).lower(*arrays, segment_ids).compile()
                found = compiled(*arrays, segment_ids)
                seconds = median_seconds(functools.partial(compiled, *arrays, segment_ids), STEPS)
            except Exception as err:  # One kernel that fails must not hide the others.
                report(kernel=kernel, failed=str(err).splitlines()[0])
                continue
            # Of outputs and gradients, the largest difference by the largest number there is.
            errors = [
                float(abs(a.astype(jnp.float32) - b).max() / abs(b).max())
                for a, b in zip(found, exact, strict=True)
            ]
            report(
                kernel=kernel,
                milliseconds=1e3 * seconds,
                tflops=work / seconds / 1e12,
                temporaries_gib=compiled.memory_analysis().temp_size_in_bytes / GIB,
                largest_error=max(errors),
            )


def _with_gradients(kernel: str) -> Callable:
    @jax.jit
    def run(query, key, value, cotangent, segment_ids):
        ours = functools.partial(
            self_attention, segment_ids=segment_ids, causal=True, kernel=kernel
        )
        output, backward = jax.vjp(ours, query, key, value)
        return output, *backward(cotangent)

    return run


def median_seconds(call: Callable[[], Any], times: int) -> float:
    """Returns the median of so many calls; none of them is the first."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def step(small: bool, folder: Path, kernel: str = "triton", dtype: str = "bfloat16") -> None:
    """Takes steps of stage 2; weights, batch and losses are left in `folder` for torch."""
    config = config_of(small, kernel, dtype)
    model = vlm.VLM(config.model)
    batch = packed_batch(config)
    with mesh_lib.use(mesh_lib.single_device()) as mesh:
        tx = optim.make_optimizer(config.optim, config.train.num_steps)
        abstract = state.abstract_state(model, config.train, tx, mesh)
        work = flops.step_flops(config, abstract.params)
        report(kernel=kernel, **{f"{part}_tflop": n / 1e12 for part, n in work.items()})
        began = time.perf_counter()
        compiled = step_lib.lower_train_step(model, config, tx, abstract, mesh).compile()
        memory = compiled.memory_analysis()
        # Donated arguments are outputs, too.
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = memory.argument_size_in_bytes + new + memory.temp_size_in_bytes
        report(
            compile_seconds=time.perf_counter() - began,
            compiled_peak_gib=memory.peak_memory_in_bytes / GIB,
            compiled_sum_gib=total / GIB,
        )
        paths = set(state.flatten(abstract.params))
        params = state.init_params(model, abstract.params, paths, jax.random.key(0))
        is_first = kernel == "triton"
        if is_first:
            training_ours.write(config, params, batch, folder)
        opt_state = state.init_opt_state(tx, paths, abstract, params)
        live = state.TrainState(
            jax.device_put(np.int32(0), abstract.step.sharding), params, opt_state
        )
        del params, opt_state
        inputs = sharding.put_batch(step_lib.train_inputs(config.train, batch), mesh)
        losses, seconds = [], []
        for _ in range(1 + STEPS):
            began = time.perf_counter()
            live, metrics = compiled(live, inputs)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(live)
            seconds.append(time.perf_counter() - began)
    report(losses=losses[:LOSSES])
    found = jax.devices()[0]
    known = {
        "flops": sum(work.values()),
        "peak_flops": flops.peak_flops([found]),
        "seq_len": config.data.seq_len,
        "losses": losses[:LOSSES],
    }
    if is_first:
        (folder / "ours.json").write_text(json.dumps(known))
    report(**speed(seconds[1:], known))
    if stats := found.memory_stats():
        report(
            device_peak_gib=stats["peak_bytes_in_use"] / GIB,
            device_limit_gib=stats["bytes_limit"] / GIB,
        )


def generation(small: bool) -> None:
    """Answers a question about each of 1, 8, 32 whole pages, with as many tokens each."""
    config = config_of(small, "auto")
    num_image = config.data.max_tiles * config.model.tokens_per_tile
    question, num_new = (8, 4) if small else (QUESTION, NUM_NEW)
    length = num_image + question
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=length))
    model = vlm.VLM(config.model)
    mesh = mesh_lib.single_device()
    with mesh_lib.use(mesh):
        abstract = state.abstract_params(model, mesh, config.train, config.lora)
        paths = set(state.flatten(abstract))
        variables = {"params": state.init_params(model, abstract, paths, jax.random.key(0))}
    # An id that no token has: no answer ends early.
    ours = sampler.Sampler(model, mesh, end_ids=(-1,), pad_id=0)
    rng = np.random.default_rng(0)
    for size in BATCH_SIZES[1:2] if small else BATCH_SIZES:
        shapes = sampler.abstract_prompts(config, size, mesh)
        batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items()}
        vocab_size = config.model.llm.vocab_size
        batch["tokens"] = rng.integers(0, vocab_size, (size, length), np.int32)
        batch["tokens"][:, :num_image] = config.model.image_token_id
        batch["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (size, length))
        batch["tiles"] = rng.integers(0, 256, batch["tiles"].shape, np.uint8)
        # The first round compiles.
        for _ in range(2):
            began = time.perf_counter()
            answering = jax.block_until_ready(ours.begin(variables, batch, num_new))
            read = time.perf_counter()
            jax.block_until_ready(ours.advance(variables, answering, num_new))
            ended = time.perf_counter()
        report(
            batch_size=size,
            prompt_tokens=length,
            new_tokens=num_new,
            prefill_seconds=read - began,
            decoded_tokens_a_second=size * (num_new - 1) / (ended - read),
            tokens_a_second=size * num_new / (ended - began),
            pages_a_second=size / (ended - began),
        )


def main(part: str, folder: str, *flags: str) -> None:
    """Runs a part."""
    small = "--small" in flags
    if part == "step":
        step(small, Path(folder))
    elif part == "step_cudnn":
        step(small, Path(folder), "auto")  # "cudnn" would refuse the encoder's odd patches.
    else:
        {"device": device, "attention": attention, "generation": generation}[part](small)


if __name__ == "__main__":
    main(*sys.argv[1:])
