"""Sizes as published, from shapes alone."""

import math

import jax
import jax.numpy as jnp
import pytest

from alignvlm_jax import presets
from alignvlm_jax.config import LLMConfig, VisionConfig
from alignvlm_jax.models.decoder import Llama
from alignvlm_jax.models.vit import Siglip


def count(module, *args) -> int:
    """Parameters of a module; nothing is computed."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def count_vision(config: VisionConfig) -> int:
    tile = jax.ShapeDtypeStruct((1, config.tile_height, config.tile_width, 3), jnp.uint8)
    return count(Siglip(config, jnp.dtype("float32"), "none"), tile)


def count_llm(config: LLMConfig) -> int:
    def use(llm: Llama, tokens):
        hidden, _ = llm(llm.embed(tokens), tokens)
        return llm.logits(hidden)

    module = Llama(config, jnp.dtype("float32"), "none")
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method=use)
    )
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def pooling_head(width: int, mlp_width: int) -> int:
    """Of SigLIP, which patch features do without: a probe, attention, a norm and an MLP."""
    return width + 4 * (width**2 + width) + 2 * width + 2 * width * mlp_width + mlp_width + width


def text_tower(width: int, mlp_width: int, num_layers: int, vocab_size: int) -> int:
    """Of SigLIP: tables of tokens and of 64 positions, blocks, a norm, a projection."""
    block = 4 * (width**2 + width) + 4 * width + 2 * width * mlp_width + mlp_width + width
    tables = (vocab_size + 64) * width
    return tables + num_layers * block + 2 * width + width**2 + width


# Of both towers, temperature and bias of the loss; so many tensors of keras-hub beside them are the
# numbers of positions, 64 of the text and those of the patches.
BASE = text_tower(768, 3072, 12, 256_000) + pooling_head(768, 3072) + 2 + 64
LARGE = text_tower(1024, 4096, 24, 256_000) + pooling_head(1024, 4096) + 2 + 64


@pytest.mark.parametrize(
    ("name", "published", "others"),
    [
        ("siglip2_b16_224", 375_188_230, BASE),
        ("siglip2_b16_256", 375_234_370, BASE),
        ("siglip2_l16_256", 881_527_106, LARGE),
        ("siglip2_l16_384", 881_855_106, LARGE),
        ("siglip2_l16_512", 882_314_306, LARGE),
    ],
)
def test_siglip2_has_its_published_number_of_parameters(name, published, others):
    config = presets.VISION[name]
    assert count_vision(config) + config.num_patches + others == published


def test_paligemmas_encoders_differ_by_their_positions_alone():
    """By as much as the whole published models of 224, 448 and 896 pixels."""
    counts = [count_vision(presets.VISION[f"siglip_so400m_14_{size}"]) for size in (224, 448, 896)]
    published = [2_923_335_408, 2_924_220_144, 2_927_759_088]
    assert [n - counts[0] for n in counts] == [n - published[0] for n in published]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("siglip_b16_224", 92_884_224 - pooling_head(768, 3072)),
        ("siglip_so400m_14_384", 428_225_600 - pooling_head(1152, 4304)),
        ("siglip2_so400m_14_384", 428_225_600 - pooling_head(1152, 4304)),
        # Another patch and another grid, else the same.
        (
            "siglip2_so400m_16_384",
            428_225_600 - pooling_head(1152, 4304) + 1152 * (3 * (16**2 - 14**2) + 24**2 - 27**2),
        ),
        # 37 x 37 positions and one of the class token become 16 x 16; no class token, no two layer
        # scales a block.
        ("dinov2_s14_224", 22_056_192 - 384 * (1 + 37**2 - 16**2 + 1 + 2 * 12)),
    ],
)
def test_vision_towers_have_their_published_number_of_parameters(name, published):
    assert count_vision(presets.VISION[name]) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1.7b", 1_711_376_384),
        ("llama32_1b", 1_235_814_400),
        ("llama32_3b", 3_212_749_824),
        ("llama31_8b", 8_030_261_248),
        ("qwen25_0.5b", 494_032_768),
        ("qwen25_1.5b", 1_543_714_304),
        ("qwen25_7b", 7_615_616_512),
        ("qwen3_0.6b", 596_049_920),
        ("qwen3_1.7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("smollm3_3b", 3_075_098_624),
    ],
)
def test_language_models_have_their_published_number_of_parameters(name, published):
    assert count_llm(presets.LLM[name]) == published


def test_the_demonstrations_towers_are_small():
    assert (
        count_vision(presets.VISION["tiny"]) == 549_760
        and count_llm(presets.LLM["tiny"]) == 459_648
    )
