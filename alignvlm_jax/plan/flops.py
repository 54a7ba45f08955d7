"""FLOPs of a training step by formula, by part of the model; what MFU is measured against.

Counted are the matrix products of the model: a multiplication and an addition are two. Attention counts all pairs of
tokens of a row, as PaLM's MFU does (arXiv 2204.02311, appendix B), and every slot of the static shapes counts, padding
too. What is computed a second time, for rematerialisation or in blocks, does not: MFU is of the work asked for.
"""

from collections.abc import Callable, Iterable

import jax

from alignvlm_jax.config import Config, ModelConfig
from alignvlm_jax.models import connectors
from alignvlm_jax.models.connectors.base import Product
from alignvlm_jax.plan import hardware
from alignvlm_jax.train import state
from alignvlm_jax.train.state import Params

PARTS = ("vision", "connector", "llm", "loss")


def step_flops(config: Config, params: Params) -> dict[str, float]:
    """Returns FLOPs of a training step by part, for `params` (or their shapes) of which the stage trains some.

    A product is made once forward; backward once more for its parameters where they are trained, and once for its
    inputs where something before it is.
    """
    trained = state.trainable_paths(config, params)
    flops = dict.fromkeys(PARTS, 0.0)
    reached = False  # Something trainable lies before: gradients have to come this far.
    for part, products in _forward(config).items():
        for product in products:
            is_trained = product.prefix is not None and any(path.startswith(product.prefix) for path in trained)
            # Of two activations each gets a gradient.
            backward = reached * (2 if product.prefix is None else 1) + is_trained
            flops[part] += product.flops * (1 + backward)
            reached |= is_trained
        # Text embeddings come in between.
        if part == "connector":
            reached |= any(path.startswith("llm/embed/") for path in trained)
    return flops


def _forward(config: Config) -> dict[str, list[Product]]:
    """The products of a step in the order in which the model makes them."""
    model, rows = config.model, config.train.batch_size
    tokens, tiles = rows * config.data.row_length, rows * config.data.max_tiles
    visual = config.train.visual_input == "pixels"
    return {
        "vision": _vision(model, tiles) if visual else [],
        "connector": connectors.get(model.connector.name).products(model, tiles * model.vision.num_patches)
        if visual
        else [],
        "llm": _llm(model, tokens, config.data.row_length),
        "loss": [Product(2 * tokens * model.llm.width * model.llm.vocab_size, _head(model))],
    }


def _head(model: ModelConfig) -> str:
    return "llm/embed/" if model.llm.tie_embeddings else "llm/head/"


def _vision(model: ModelConfig, tiles: int) -> list[Product]:
    c = model.vision
    patches = tiles * c.num_patches
    pixels = c.patch_height * c.patch_width * len(c.pixel_mean)
    block = [
        Product(2 * patches * 3 * c.width**2, "vision/blocks/attn/"),
        Product(2 * 2 * patches * c.num_patches * c.width),
        Product(2 * patches * c.width**2, "vision/blocks/attn/"),
        Product(2 * 2 * patches * c.width * c.mlp_width, "vision/blocks/mlp/"),
    ]
    return [Product(2 * patches * pixels * c.width, "vision/patch_embed/"), *block * c.num_layers]


def _llm(model: ModelConfig, tokens: int, length: int) -> list[Product]:
    c = model.llm
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    block = [
        Product(2 * tokens * c.width * (queries + 2 * keys), "llm/blocks/attn/"),
        Product(2 * 2 * tokens * length * queries),
        Product(2 * tokens * queries * c.width, "llm/blocks/attn/"),
        Product(2 * 3 * tokens * c.width * c.mlp_width, "llm/blocks/mlp/"),
    ]
    return block * c.num_layers


def mfu_of(config: Config, params: Params, devices: Iterable[jax.Device]) -> Callable[[float], dict[str, float]]:
    """Returns steps a second -> {"mfu": share of what the devices could do}; -> {} where that is not known."""
    total, peak = sum(step_flops(config, params).values()), peak_flops(devices)
    return lambda steps_per_second: {} if peak is None else {"mfu": steps_per_second * total / peak}


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Returns the bfloat16 FLOP/s of all devices together; None where a kind is not known."""
    found = [hardware.chip_of(device) for device in devices]
    return None if None in found else sum(chip.tflops for chip in found) * 1e12
