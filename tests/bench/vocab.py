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
from alignvlm_jax.plan import hardware
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


def main() -> None:
    """Prints the tables that docs/results.md shows."""
    if hardware.has_tpu_compiler():
        print_memory()
    else:
        print("no table of memory: libtpu is not installed (requirements-tpu.txt)")
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
