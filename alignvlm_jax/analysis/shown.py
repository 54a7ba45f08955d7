"""What the patches of pages show, by the boxes of the pages' words.

Tokens are compared by their characters: a word at the start of a line and one after a space are
different tokens in most vocabularies, and a patch looks the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from alignvlm_jax.config import ModelConfig
from alignvlm_jax.data import labels
from alignvlm_jax.data.record import Record
from alignvlm_jax.data.tokenizers.base import Tokenizer, readable
from alignvlm_jax.errors import UserError
from alignvlm_jax.inference.loading import Loaded
from alignvlm_jax.models import connectors

NONE = -1
"""In the place of a label that a patch does not have."""


def check(model: ModelConfig) -> None:
    """Raises UserError where it is not known what a visual token shows."""
    if not connectors.get(model.connector.name).has_patch_tokens():
        raise UserError(
            f"connector {model.connector.name!r} makes {model.tokens_per_tile} tokens of a tile's "
            f"{model.vision.num_patches} patches, and none that is of one patch: it is not known "
            "what a token shows"
        )


class Shown(NamedTuple):
    """The tokens that n patches show.

    Attributes:
      tokens: those with the largest area first and then `NONE`, int32 [n, k].
      weights: their fractions of the patch, float32 [n, k].
    """

    tokens: np.ndarray
    weights: np.ndarray


def of_patches(loaded: Loaded, pages: Sequence[Record]) -> Shown:
    """Returns what the patches of all tiles of pages show, page after page: as the visual tokens of
    their prompts stand.

    A patch has no token where it is blank, its text is too small to be read, or the page's words
    are not known.

    Raises:
      UserError: an image cannot be read.
    """
    builder = loaded.builder
    # The LLM's own tokens, whatever the unit is that the connector was taught.
    data = dataclasses.replace(builder.data, label_unit="token")
    parts = []
    for page in pages:
        tiles = builder.tile_pages(page)
        # In the order of the record's images and of their tiles, as `prompt` stacks them.
        found = labels.labels_of_record(page.lines, tiles, loaded.tokenizer, builder.vision, data)
        is_text = (found.weights > 0) & (found.ids != loaded.tokenizer.space_id)
        # 0 where a word's box covers the patch, but none of its ink, or ink too small to be read.
        is_text &= found.loss_weights[..., None] > 0
        arrays = (np.where(is_text, found.ids, NONE), np.where(is_text, found.weights, 0))
        parts.append([array.reshape(-1, data.max_patch_labels) for array in arrays])
    return Shown(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def characters(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Returns a number for each of some tokens, int [...], that tokens of the same characters but
    for spaces at their ends have in common; `NONE` stays."""
    numbers: dict[str, int] = {}
    found = {NONE: NONE}
    for token in np.unique(tokens[tokens != NONE]).tolist():
        piece = tokenizer.piece(token)
        # Spaces alone are left as they are: stripped, all of them would be one token.
        text = piece.strip(readable(" ")) or piece
        # The token itself as the number of the first of its kind: the same in every call.
        found[token] = numbers.setdefault(text, token)
    known = np.array(sorted(found))
    return np.array([found[token] for token in known])[np.searchsorted(known, tokens)]
