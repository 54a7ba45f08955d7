"""What lies over the vocabulary, plain against a chunk of columns at a time: memory on a TPU, time
on this machine.

    python -m tests.bench.vocab          (make bench)

Memory is what the TPU's compiler reports (libtpu, requirements-tpu.txt) for v5e:2x2 as a mesh 1 x 1
x 4, forward and backward, inputs bfloat16. The float32 accumulators of the gradients of W2 and E
are the gradients that are returned: they count as outputs, not as temporaries.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from alignvlm_jax import presets
from alignvlm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from alignvlm_jax.ops.chunked import columns_per_chunk
from alignvlm_jax.ops.cross_entropy import token_losses
from alignvlm_jax.ops.vocab_average import Norm, vocab_average
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import hardware, hlo
from tests.bench import machine, memory
from tests.bench.memory import Memory

CONFIG = Config(
    model=ModelConfig(vision=presets.VISION["tiny"], llm=presets.LLM["tiny"]),
    mesh=MeshConfig(data=1, fsdp=1, tensor=4),
    train=TrainConfig(batch_size=4),
)
COLUMNS = 2048
SIZES = [(rows, words) for words in (32_768, 128_256, 256_512) for rows in (2048, 8192, 32_768)]
WIDTH = 2048
ROUNDS = 7
PATCHES = 7290  # of 10 tiles, a sequence of the paper's
WIDTH_8B = 4096
VOCAB_8B = 128_256
SLICES = [("v5p:4x4x4", 4), ("v5e:4x4", 1), ("v6e:4x4", 1)]
"""Slices, and sequences a chip."""
CHUNK_SIZES_MIB = (64, 256, 512)


def main() -> None:
    """Prints the tables that docs/results.md shows."""
    if hardware.has_tpu_compiler():
        print_memory()
        print_cycles()
    else:
        print("no tables of TPUs: libtpu is not installed (requirements-tpu.txt)")
    print_time()


def print_memory() -> None:
    """Temporaries of ALIGN over rows and words, and of the loss."""
    devices = hardware.compile_only_devices(hardware.parse_topology("v5e:2x2"))
    with mesh_lib.use(mesh_lib.make_mesh(CONFIG.mesh, CONFIG.model, CONFIG.train, devices)) as mesh:
        print(
            f"ALIGN, D {WIDTH:,}, chunks of {COLUMNS:,} columns; temporaries in GiB a chip, and outputs\n"
        )
        print("| N | V | plain | chunked | outputs |\n|---|---|---|---|---|")
        for rows, words in SIZES:
            plain = align_memory(mesh, rows, words, None)
            (temporaries, outputs) = align_memory(mesh, rows, words, COLUMNS)
            shown = "over 15.75" if plain is None else f"{plain[0]:.3f}"
            print(
                f"| {rows:,} | {words:,} | {shown} | {temporaries:.3f} | {outputs:.3f} |",
                flush=True,
            )
        print("\nloss over 16,384 tokens, V 128,256: ", end="")
        plain, chunked = (
            memory.shown(loss_memory(mesh, 128_256, chunk)) for chunk in (None, COLUMNS)
        )
        print(f"plain {plain}, chunked {chunked} GiB of temporaries a chip\n", flush=True)


def align_memory(
    mesh: jax.sharding.Mesh, rows: int, words: int, chunk: int | None
) -> Memory | None:
    """GiB of temporaries and of outputs a chip; None where the program does not fit."""

    def step(x, head, table, scale, bias, back):
        def run(x, head, table, scale, bias):
            return vocab_average(x, head, table, Norm(scale, bias, 1e-5), chunk=chunk).average

        average, pull = jax.vjp(run, x, head, table, scale, bias)
        return average, pull(back)

    by_rows, wide, tall, words_only = _shardings(
        mesh, (("data", "fsdp"),), (None, "tensor"), ("tensor",), ("tensor",)
    )
    x = jax.ShapeDtypeStruct((rows, WIDTH), jnp.bfloat16, sharding=by_rows)
    head = jax.ShapeDtypeStruct((WIDTH, words), jnp.float32, sharding=wide)
    table = jax.ShapeDtypeStruct((words, WIDTH), jnp.float32, sharding=tall)
    scale = jax.ShapeDtypeStruct((words,), jnp.float32, sharding=words_only)
    out = by_rows, (by_rows, wide, tall, words_only, words_only)
    return memory.of(step, out, x, head, table, scale, scale, x)


def print_cycles() -> None:
    """Seconds of ALIGN, forward and backward, by the compiler's cycles; without collectives, which
    have none."""
    print(f"ALIGN, D {WIDTH_8B:,}, V {VOCAB_8B:,}, seconds by the compiler's cycles\n")
    print("| | sequences a chip | at the peak |", end="")
    print("|".join(f" {size} MiB " for size in CHUNK_SIZES_MIB), "| temporaries, GiB |")
    print("|---" * (4 + len(CHUNK_SIZES_MIB)) + "|")
    for name, sequences in SLICES:
        topology = hardware.parse_topology(name)
        rows = sequences * PATCHES
        peak = 12 * rows * WIDTH_8B * VOCAB_8B / (topology.chip.tflops * 1e12)
        print(f"| {name} | {sequences} | {peak:.2f} |", end="", flush=True)
        for size in CHUNK_SIZES_MIB:
            seconds, temporaries = align_seconds(topology, rows, size)
            print(f" {seconds:.2f} |", end="", flush=True)
        print(f" {temporaries:.2f} |", flush=True)
    print()


def align_seconds(
    topology: hardware.Topology, rows: int, chunk_size_mib: float
) -> tuple[float, float]:
    """Seconds of ALIGN's forward and backward pass on a chip with so many rows, and GiB of
    temporaries."""
    devices = hardware.compile_only_devices(topology)
    mesh_config = MeshConfig(data=1, fsdp=len(devices), tensor=1)
    num_rows = rows * len(devices)
    with mesh_lib.use(mesh_lib.make_mesh(mesh_config, CONFIG.model, None, devices)) as mesh:
        chunk = columns_per_chunk("auto", chunk_size_mib, num_rows, VOCAB_8B)

        def step(x, head, table, scale, bias, back):
            def run(x, head, table, scale, bias):
                return vocab_average(x, head, table, Norm(scale, bias, 1e-5), chunk=chunk).average

            average, pull = jax.vjp(run, x, head, table, scale, bias)
            return average, pull(back)

        by_rows, wide, tall, whole = _shardings(mesh, ("fsdp",), ("fsdp",), (None, "fsdp"), ())
        x = jax.ShapeDtypeStruct((num_rows, WIDTH_8B), jnp.bfloat16, sharding=by_rows)
        head = jax.ShapeDtypeStruct((WIDTH_8B, VOCAB_8B), jnp.float32, sharding=wide)
        table = jax.ShapeDtypeStruct((VOCAB_8B, WIDTH_8B), jnp.float32, sharding=tall)
        scale = jax.ShapeDtypeStruct((VOCAB_8B,), jnp.float32, sharding=whole)
        out = by_rows, (by_rows, wide, tall, whole, whole)
        arguments = (x, head, table, scale, scale, x)
        compiled = jax.jit(step, out_shardings=out).lower(*arguments).compile()
    runs = hlo.parse(compiled.as_text()).runs()
    cycles = sum(run.times * run.op.cycles for run in runs if not run.is_fused)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / memory.GIB
    return cycles / (topology.chip.ghz * 1e9), temporaries


def loss_memory(mesh: jax.sharding.Mesh, words: int, chunk: int | None) -> Memory | None:
    """GiB of temporaries and of outputs a chip for 2 rows of 8,192 tokens."""

    def step(hidden, head, targets):
        def run(hidden, head):
            losses = token_losses(hidden, head, targets, is_table=False, chunk=chunk)
            return losses.nll.sum() + 1e-4 * jnp.square(losses.log_sum_exp).sum()

        return jax.value_and_grad(run, argnums=(0, 1))(hidden, head)

    by_rows, wide = _shardings(mesh, (("data", "fsdp"),), (None, "tensor"))
    hidden = jax.ShapeDtypeStruct((2, 8192, WIDTH), jnp.bfloat16, sharding=by_rows)
    head = jax.ShapeDtypeStruct((WIDTH, words), jnp.float32, sharding=wide)
    targets = jax.ShapeDtypeStruct((2, 8192), jnp.int32, sharding=by_rows)
    return memory.of(step, (None, (by_rows, wide)), hidden, head, targets)


def print_time() -> None:
    """Seconds of both forms in turns, and of plain jax.numpy without any of ours, on this machine's
    CPU."""
    rows = 2048
    width = 256
    words = 16_384
    rng = np.random.default_rng(0)
    shapes = [(rows, width), (width, words), (words, width), (words,), (words,)]
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    chunk = columns_per_chunk("auto", 64.0, rows, words)
    forms = {
        "reference": reference,
        "plain": _ours(None),
        f"chunked ({chunk:,} columns)": _ours(chunk),
    }
    compiled = {
        name: jax.jit(jax.grad(_summed(impl), argnums=range(5))) for name, impl in forms.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS + 1):  # The first compiles.
        for name, run in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            seconds[name].append(time.perf_counter() - began)
    print(
        f"CPU, N {rows:,}, D {width}, V {words:,}, float32, forward and backward, median of "
        f"{ROUNDS}\n"
    )
    print("| form | seconds | of the reference |\n|---|---|---|")
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / medians['reference']:.2f} |")


def reference(
    x: jax.Array, head: jax.Array, table: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Equation 1 in plain jax.numpy."""
    logits = x @ head
    centred = logits - logits.mean(-1, keepdims=True)
    normed = (
        centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * scale + bias
    )
    return jax.nn.softmax(normed, axis=-1) @ table


def _ours(chunk: int | None) -> Callable[..., jax.Array]:
    def run(x, head, table, scale, bias):
        return vocab_average(x, head, table, Norm(scale, bias, 1e-5), chunk=chunk).average

    return run


def _summed(impl: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *inputs: jnp.sin(impl(*inputs)).sum()


def _shardings(mesh: jax.sharding.Mesh, *specs: tuple) -> list[jax.sharding.NamedSharding]:
    return [sharding.NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]


if __name__ == "__main__":
    with machine.watched():
        main()
