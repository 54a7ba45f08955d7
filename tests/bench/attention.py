"""Memory of attention on a TPU by kernel, as the TPU's compiler reports it.

python -m tests.bench.attention          (make bench; needs libtpu, requirements-tpu.txt)
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from alignvlm_jax import presets
from alignvlm_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from alignvlm_jax.ops.attention import self_attention
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.plan import hardware
from tests.bench import memory
from tests.bench.memory import Memory

CONFIG = Config(
    model=ModelConfig(vision=presets.VISION["tiny"], llm=presets.LLM["tiny"]),
    mesh=MeshConfig(data=1, fsdp=4, tensor=1),
    train=TrainConfig(batch_size=4),
)
ROWS = 4  # one a chip
SHAPES = {
    "Llama 3.2 1B, a row of stage 1, causal, packed": (8320, 32, 8, 64, True),
    "Llama 3.1 8B, a row of stage 2, causal, packed": (9344, 32, 8, 128, True),
}


def main() -> None:
    """Prints the table that docs/results.md shows."""
    devices = hardware.compile_only_devices(hardware.parse_topology("v5e:2x2"))
    print(
        "| forward and backward, bfloat16, v5e, GiB of temporaries a chip | xla | splash "
        "|\n|---|---|---|"
    )
    with mesh_lib.use(mesh_lib.make_mesh(CONFIG.mesh, CONFIG.model, CONFIG.train, devices)) as mesh:
        for name, shape in SHAPES.items():
            xla, splash = (
                memory.shown(attention_memory(mesh, kernel, *shape)) for kernel in ("xla", "splash")
            )
            print(f"| {name} | {xla} | {splash} |", flush=True)


def attention_memory(
    mesh: jax.sharding.Mesh,
    kernel: str,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
) -> Memory | None:
    """Of attention and its gradients, one row a chip."""

    def run(query, key, value, segment_ids):
        mixed = self_attention(
            query, key, value, segment_ids if causal else None, causal=causal, kernel=kernel
        )
        return mixed.astype(jnp.float32).sum()

    by_rows = sharding.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    arrays = [
        jax.ShapeDtypeStruct((ROWS, length, count, head_dim), jnp.bfloat16, sharding=by_rows)
        for count in (heads, kv_heads, kv_heads)
    ]
    segments = jax.ShapeDtypeStruct((ROWS, length), jnp.int32, sharding=by_rows)
    return memory.of(jax.grad(run, argnums=(0, 1, 2)), (by_rows,) * 3, *arrays, segments)


if __name__ == "__main__":
    main()
