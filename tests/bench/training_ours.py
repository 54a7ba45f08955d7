"""Our side of `tests.bench.train`: the training step as `train` compiles it, of random weights,
which are written for the other side in the names of transformers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from alignvlm_jax import presets
from alignvlm_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    VisionConfig,
)
from alignvlm_jax.models import connectors, vlm
from alignvlm_jax.parallel import mesh as mesh_lib
from alignvlm_jax.parallel import sharding
from alignvlm_jax.train import optim, state
from alignvlm_jax.train import step as step_lib
from alignvlm_jax.weights import export

# Pixels as SigLIP's processor normalises them, square tiles and patches: else transformers has no
# class for the encoder. 64 patches, the two tiles of the demonstration.
SMALL = dataclasses.replace(
    presets.VISION["tiny"],
    tile_height=64,
    tile_width=64,
    patch_height=8,
    patch_width=8,
    pixel_mean=(0.5,) * 3,
    pixel_std=(0.5,) * 3,
)
# DINOv2-S in size, 256 patches.
S14 = VisionConfig(
    tile_height=224,
    tile_width=224,
    patch_height=14,
    patch_width=14,
    width=384,
    mlp_width=1536,
    num_layers=12,
    num_heads=6,
)
# Of a constant learning rate; the other side has the same.
OPTIM = OptimConfig(learning_rate=1e-4, warmup_steps=0, final_fraction=1.0)
# Encoder, LLM, sequences, their tokens, and layers compiled in a row.
CASES = {
    "tiny": (
        dataclasses.replace(SMALL, width=32, mlp_width=64, num_layers=1, tile_height=16, tile_width=16),
        dataclasses.replace(presets.LLM["tiny"], width=32, mlp_width=64, num_layers=2, head_dim=8),
        2, 12, 1,
    ),
    "demonstration": (SMALL, presets.LLM["tiny"], 16, 144, 3),
    "smollm2": (S14, presets.LLM["smollm2_135m"], 2, 384, 1),
}  # fmt: skip


def config_of(case: str, connector: str) -> Config:
    """Returns the config of a case, of a constant learning rate."""
    vision, llm, batch_size, seq_len, unroll = CASES[case]
    return Config(
        model=ModelConfig(
            vision=vision,
            llm=llm,
            connector=connectors.get(connector).Options(name=connector),
            image_token_id=llm.vocab_size,
            remat="none",
            scan_unroll=unroll,
            # As torch does it: all logits at once.
            vocab_impl="plain",
            dtype="float32",
        ),
        data=DataConfig(seq_len=seq_len, max_tiles=1),
        optim=OPTIM,
        train=TrainConfig(num_steps=1000, batch_size=batch_size, patch_token_weight=0.0),
        mesh=MeshConfig(data=1),
    )


def start(case: str, connector: str, folder: Path) -> tuple[int, Callable[[], float]]:
    """Writes weights and batch into the folder; returns the number of parameters, and what takes a
    step and returns its loss."""
    config = config_of(case, connector)
    model = vlm.VLM(config.model)
    batch = random_batch(config)
    with mesh_lib.use(mesh_lib.single_device()) as mesh:
        tx = optim.make_optimizer(config.optim, config.train.num_steps)
        abstract = state.abstract_state(model, config.train, tx, mesh)
        paths = state.flatten(abstract.params).keys()
        params = state.init_params(model, abstract.params, set(paths), jax.random.key(0))
        write(config, params, batch, folder)
        opt_state = state.init_opt_state(tx, set(paths), abstract, params)
        zero = jax.device_put(np.int32(0), abstract.step.sharding)
        live = [state.TrainState(zero, params, opt_state)]
        compiled = step_lib.lower_train_step(model, config, tx, abstract, mesh).compile()
        inputs = sharding.put_batch(step_lib.train_inputs(config.train, batch), mesh)

    def step() -> float:
        live[0], metrics = compiled(live[0], inputs)
        jax.block_until_ready(live[0])
        return float(metrics["loss"])

    return sum(x.size for x in jax.tree.leaves(params)), step


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """Sequences of one tile and random text, whose every token is predicted."""
    rng = np.random.default_rng(0)
    shapes = vlm.abstract_batch(config.model, config.data, config.train.batch_size)
    batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items()}
    shape = batch["tokens"].shape
    num_image = config.model.tokens_per_tile
    for name in ("tokens", "targets"):
        batch[name] = rng.integers(0, config.model.llm.vocab_size, shape, np.int32)
    batch["tokens"][:, :num_image] = config.model.image_token_id
    batch["loss_weights"][:, :num_image] = 0
    batch["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch["tiles"] = rng.integers(0, 256, batch["tiles"].shape, np.uint8)
    return batch


def write(config: Config, params: state.Params, batch: dict[str, np.ndarray], folder: Path) -> None:
    """Writes `folder` as an export in components, and batch.npz."""
    np.savez(folder / "batch.npz", **batch)
    leaves = state.flatten(params)
    shapes = {path: x.shape for path, x in leaves.items()}
    components = {
        name: export.component_of(name, "components", config.model, shapes)
        for name in export.COMPONENTS
    }
    export.write(components, leaves, lambda path: np.asarray(leaves[path]), folder)
