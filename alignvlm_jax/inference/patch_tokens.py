"""Asks a model what the patches of pages say."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax import numpy as jnp
from PIL import Image

from alignvlm_jax import config as config_lib
from alignvlm_jax.config import ModelConfig
from alignvlm_jax.data import labels, tiling
from alignvlm_jax.data.images import Tiles
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference import tiles as tiles_lib
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import connectors
from alignvlm_jax.models.vlm import VLM
from alignvlm_jax.pictures.patch_map import Lens
from alignvlm_jax.shapes import Array, Float, Int

NUM_TOKENS = 8


def has_patch_distribution(model: ModelConfig) -> bool:
    """Returns whether the model's connector gives patches a distribution over the vocabulary."""
    connector = model.connector
    return connectors.get(connector.name).has_probabilities(connector)


def check(model: ModelConfig) -> None:
    """Raises UserError if the model's connector has no distribution over the vocabulary."""
    if not has_patch_distribution(model):
        options = dataclasses.asdict(model.connector)
        name = options.pop("name")
        plain = dataclasses.asdict(config_lib.connector(model.connector.name))
        changed = ", ".join(
            f"{option} {value!r}" for option, value in options.items() if value != plain[option]
        )
        connector = f"{name!r} with {changed}" if changed else f"{name!r}"
        raise UserError(
            f"connector {connector} gives patches no distribution over words: there is nothing to "
            "read"
        )


def lenses(
    loaded: Loaded, pages: Sequence[Image.Image], num_tokens: int = NUM_TOKENS
) -> list[Lens]:
    """Returns a lens for each page, RGB: of the tiles that the model would be asked with.

    Raises:
      UserError: the model's connector has no distribution over the vocabulary.
    """
    config = loaded.config
    check(config.model)
    cut = [tiling.tile_page(page, config.model.vision, config.data) for page in pages]
    read = _reader(min(num_tokens, config.model.llm.unpadded_vocab_size))
    # A tile a device at a time: a page's distributions over 128 K words take 3.7 GB.
    parts = tiles_lib.map_tiles(
        loaded, read, {"tiles": np.concatenate([tiles.pixels for tiles in cut])}
    )
    # Tokens and probabilities [n, P, K] and entropies [n, P] of the n tiles of all pages, which are
    # cut into pages again below.
    seen = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    ends = np.cumsum([len(tiles.pixels) for tiles in cut])[:-1]
    by_page = zip(*(np.split(array, ends) for array in seen), strict=True)
    return [
        _lens(page, tiles, loaded, *arrays)
        for page, tiles, arrays in zip(pages, cut, by_page, strict=True)
    ]


# One function for each count: what it compiles to is kept by the function itself.
@functools.lru_cache
def _reader(count: int) -> Callable:
    return functools.partial(_read, count=count)


def _read(
    model: VLM, variables: Mapping, batch: Mapping[str, Array], *, count: int
) -> tuple[Int[Array, "B P k"], Float[Array, "B P k"], Float[Array, "B P"]]:
    """The likeliest tokens of one tile a row, their probabilities, and entropies in
    bits."""
    # A row is a sequence of one tile: [B, 1, P, V] -> [B, P, V].
    probabilities_BPV = model.apply(variables, batch, method="patch_probabilities")[:, 0]
    likeliest, tokens = jax.lax.top_k(probabilities_BPV, count)
    return tokens, likeliest, jax.scipy.special.entr(probabilities_BPV).sum(-1) / jnp.log(2.0)


def _lens(
    page: Image.Image,
    tiles: Tiles,
    loaded: Loaded,
    tokens_IPk: Int[np.ndarray, "I P k"],
    probabilities_IPk: Float[np.ndarray, "I P k"],
    entropies_IP: Float[np.ndarray, "I P"],
) -> Lens:
    boxes, visible = labels.patch_boxes(tiles, loaded.config.model.vision)
    is_overview = np.zeros_like(visible)
    # The overview is the first tile; a page of a single cell has none.
    is_overview[0] = loaded.config.data.use_overview and len(visible) > 1
    return Lens(
        page,
        boxes[visible],
        tokens_IPk[visible],
        probabilities_IPk[visible],
        entropies_IP[visible],
        is_overview[visible],
        loaded.tokenizer,
        loaded.config.model.llm.unpadded_vocab_size,
    )
