"""The vision-language model: tiles -> vision encoder -> connector -> visual tokens among the text
embeddings -> decoder -> logits.

Letters: `shapes.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from alignvlm_jax.config import DataConfig, ModelConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.models import connectors
from alignvlm_jax.models.connectors.base import KEPT_ENTRIES, VOCABULARY_SUBSET, PatchLabels
from alignvlm_jax.models.decoder import Cache, Llama
from alignvlm_jax.models.layers import SOWN
from alignvlm_jax.models.vit import Siglip
from alignvlm_jax.ops.cross_entropy import TokenLosses
from alignvlm_jax.shapes import Array, Bool, Float, Int, UInt8, UInt32

NUM_CHANNELS = 3
INIT_LENGTH = 8
"""Tokens of the sequences that parameters are initialised over; even, as cuDNN's attention asks."""


class Output(NamedTuple):
    """Logits that predict each position's next token, and the connector's loss of each patch (zeros
    without labels)."""

    logits: Float[Array, "B T V"]
    patch_nll: Float[Array, "B I P"]


class Losses(NamedTuple):
    """Losses of predicting each position's target, and the connector's loss of each patch (zeros
    without labels)."""

    tokens: TokenLosses
    patch_nll: Float[Array, "B I P"]


class VLM(nn.Module):
    """The whole model; its batches are those of `data.record.Batch`."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(self.config.dtype)
        self.vision = Siglip(c.vision, dtype, c.remat, c.scan_unroll, c.attention)
        self.connector = connectors.get(c.connector.name)(c, dtype)
        self.llm = Llama(c.llm, dtype, c.remat, c.scan_unroll, c.attention)

    def __call__(self, batch: Mapping[str, Array], visual_source: str = "pixels") -> Output:
        """Returns the logits of every position, and the patch loss where the batch has labels.

        Args:
          batch: tokens, positions, segment_ids; tiles for "pixels"; patch_label_ids and
            patch_label_weights for "oracle", and for the patch loss; kept_patches where only
            these have image tokens. One with neither tiles nor
            labels is text alone: it has no image tokens, vision encoder and connector are not
            applied, and I is 0.
          visual_source: "pixels", or "oracle": the average of the text embeddings that the labels
            name takes the place of the connector's visual tokens, and no image is encoded.
        """
        hidden_BTD, patch_nll = self._hidden(batch, visual_source)
        return Output(self.llm.logits(hidden_BTD), patch_nll)

    def losses(self, batch: Mapping[str, Array], visual_source: str = "pixels") -> Losses:
        """Returns the losses of predicting batch["targets"], and the patch loss as `__call__`;
        logits are made in chunks where the config says so."""
        c = self.config
        hidden_BTD, patch_nll = self._hidden(batch, visual_source)
        return Losses(
            self.llm.token_losses(hidden_BTD, batch["targets"], c.vocab_impl, c.chunk_size_mib),
            patch_nll,
        )

    def patch_losses(
        self, batch: Mapping[str, Array], num_sampled: int = 0
    ) -> Float[Array, "B I P"]:
        """Returns the patch loss alone, without the visual tokens and the LLM: all that a connector
        and a vision encoder need which learn from patch labels; `num_sampled` is that of
        `Connector.patch_nll`."""
        features = self.features(batch)
        nll_N = self.connector.patch_nll(
            features.reshape(-1, features.shape[-1]), _patch_labels(batch), num_sampled
        )
        return nll_N.reshape(features.shape[:-1])

    def encode_tiles(
        self, tiles: UInt8[Array, "B I Y X C"] | Float[Array, "B I Y X C"]
    ) -> Float[Array, "B I P E"]:
        """Returns patch features; every tile is encoded by itself. Pixels are those of `Siglip`."""
        batch, num_tiles = tiles.shape[:2]
        features = self.vision(tiles.reshape(batch * num_tiles, *tiles.shape[2:]))  # [B I, P, E]
        return features.reshape(batch, num_tiles, *features.shape[1:])

    def features(self, batch: Mapping[str, Array]) -> Float[Array, "B I P E"]:
        """Returns the patch features that the connector receives.

        Where the batch has noise_sigma, float32 [B], and noise_seed, uint32 [B], Gaussian noise is
        added. The noise of a sequence follows from its seed alone, and is scaled by its sigma.
        """
        features = self.encode_tiles(batch["tiles"])
        if "noise_sigma" not in batch:
            return features

        # A key for each sequence: its noise does not depend on the rest of the batch.
        def draw(seed: UInt32[Array, ""], sigma: Float[Array, ""]) -> Float[Array, "I P E"]:
            return sigma * jax.random.normal(jax.random.key(seed), features.shape[1:], jnp.float32)

        # [B, I, P, E]. The sum is made in float32 and rounded once: bfloat16 noise would be rounded
        # twice.
        noise = jax.vmap(draw)(batch["noise_seed"], batch["noise_sigma"])
        return (features.astype(jnp.float32) + noise).astype(features.dtype)

    def visual_tokens(self, batch: Mapping[str, Array]) -> Float[Array, "B M D"]:
        """Returns the connector's visual tokens, those of a sequence's tiles one after another."""
        return self._visual_tokens(batch, "pixels")[0]

    def prompt_embeddings(self, batch: Mapping[str, Array]) -> Float[Array, "B T D"]:
        """Returns what the decoder reads of prompts: text embeddings, and visual tokens at the
        image tokens. The batch is that of `prefill`."""
        return self._read(batch, "pixels")[0]

    def patch_probabilities(self, batch: Mapping[str, Array]) -> Float[Array, "B I P V"]:
        """Returns each patch's distribution over the vocabulary; only for connectors that have
        one."""
        features = self.features(batch)
        probabilities_NV = self.connector.probabilities(features.reshape(-1, features.shape[-1]))
        return probabilities_NV.reshape(*features.shape[:-1], -1)

    def prefill(
        self, batch: Mapping[str, Array], num_new: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Runs the decoder over one prompt a sequence (segment 1, then padding); a batch without
        "tiles" is text alone.

        Returns:
          The logits of each sequence's first new token, and a cache with room for `num_new` tokens
          after the T slots of the prompt. Padding lies between; `decode`'s mask must keep it out.
        """
        segment_ids = batch["segment_ids"]
        size, length = segment_ids.shape
        x_BTD, _ = self._read(batch, "pixels")
        # One cache for prompt and answer: one that grew would change its shape, and each step
        # compile anew.
        cache = self.llm.empty_cache(size, length + num_new)
        # Segments are left out, since cuDNN's kernel takes them as a bias [B, 1, T, T]. They are
        # not needed: prompt tokens stand before the padding, and what the padding sees is not used.
        hidden_BTD, cache = self.llm(x_BTD, batch["positions"], cache=cache)
        # Only the last token of each prompt goes through the LM head: logits of all would take
        # [B, T, V]. It is not the last of the array, where shorter prompts have padding.
        last_B = (segment_ids > 0).sum(-1) - 1
        hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
        return self.llm.logits(hidden_B1D)[:, 0], cache

    def decode(
        self,
        tokens: Int[Array, "B"],
        positions: Int[Array, "B"],
        mask: Bool[Array, "B S"],
        cache: Cache,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Runs the decoder over one more token of each sequence, and returns the logits of the next
        and the cache; `mask` admits cache slots, this token's own included."""
        x_B1D = self.llm.embed(tokens[:, None])
        hidden_B1D, cache = self.llm(x_B1D, positions[:, None], cache=cache, mask=mask[:, None])
        return self.llm.logits(hidden_B1D)[:, 0], cache

    def _hidden(
        self, batch: Mapping[str, Array], visual_source: str
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B I P"]]:
        """Returns the last hidden states and patch losses."""
        x_BTD, patch_nll = self._read(batch, visual_source)
        hidden_BTD, _ = self.llm(x_BTD, batch["positions"], batch["segment_ids"])
        return hidden_BTD, patch_nll

    def _read(
        self, batch: Mapping[str, Array], visual_source: str
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B I P"]]:
        """Returns the decoder's input and patch losses."""
        if "tiles" not in batch and "patch_label_ids" not in batch:
            no_patches = (len(batch["tokens"]), 0, self.config.vision.num_patches)
            return self.llm.embed(batch["tokens"]), jnp.zeros(no_patches, jnp.float32)
        visual_BMD, patch_nll = self._visual_tokens(batch, visual_source)
        if "kept_patches" in batch:
            # The kept ones first, in their order, so that image tokens count them alone.
            is_kept_BM = batch["kept_patches"].reshape(visual_BMD.shape[:2])
            order_BM = jnp.argsort(~is_kept_BM, axis=1, stable=True)
            visual_BMD = jnp.take_along_axis(visual_BMD, order_BM[..., None], axis=1)
        return self._merge(batch["tokens"], visual_BMD), patch_nll

    def _visual_tokens(
        self, batch: Mapping[str, Array], visual_source: str
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B I P"]]:
        """Returns visual tokens, those of a sequence's tiles one after another, and patch
        losses."""
        labels = _patch_labels(batch) if "patch_label_ids" in batch else None
        if visual_source == "oracle":
            size, num_tiles, patches, _ = batch["patch_label_ids"].shape
            # N and k stand where `embed` speaks of B and T: labels are sharded over the batch as
            # sequences are.
            vectors_NkD = self.llm.embed(labels.ids)
            tokens_ND = jnp.einsum(
                "NkD,Nk->ND", vectors_NkD, labels.weights.astype(vectors_NkD.dtype)
            )
            return tokens_ND.reshape(size, num_tiles * patches, -1), jnp.zeros(
                (size, num_tiles, patches), jnp.float32
            )
        features = self.features(batch)
        size, num_tiles, patches, width = features.shape
        # [B, I, P, E] -> [B I P, E]: a connector knows tiles and patches, and nothing of sequences.
        output = self.connector(features.reshape(-1, width), self.llm.table, labels)
        return output.tokens.reshape(
            size, num_tiles * self.config.tokens_per_tile, -1
        ), output.patch_nll.reshape(size, num_tiles, patches)

    def _merge(
        self, tokens_BT: Int[Array, "B T"], visual_BMD: Float[Array, "B M D"]
    ) -> Float[Array, "B T D"]:
        """Returns text embeddings with a sequence's n-th visual token at its n-th image token.

        The tiles in use come first in a sequence, so that unused ones are never reached.
        """
        is_image_BT = tokens_BT == self.config.image_token_id
        # The image token's id may lie beyond the text table: entry 0 stands in for the lookup.
        text_BTD = self.llm.embed(jnp.where(is_image_BT, 0, tokens_BT))
        # Before the first image token the count is -1.
        image_index_BT = jnp.clip(jnp.cumsum(is_image_BT, axis=1) - 1, 0)
        # [B, M, D] at [B, T, 1] -> [B, T, D]. Text tokens, too, fetch the visual token before them;
        # the `where` drops it. So the shapes do not depend on how many image tokens there are.
        image_BTD = jnp.take_along_axis(visual_BMD, image_index_BT[..., None], axis=1)
        x_BTD = jnp.where(is_image_BT[..., None], image_BTD, text_BTD)
        return nn.with_logical_constraint(x_BTD, ("act_batch", "act_len", "act_embed"))


def _patch_labels(batch: Mapping[str, Array]) -> PatchLabels:
    """Returns the labels of all patches of a batch."""
    k = batch["patch_label_ids"].shape[-1]
    return PatchLabels(
        batch["patch_label_ids"].reshape(-1, k), batch["patch_label_weights"].reshape(-1, k)
    )


def hidden_states(
    model: VLM, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> Float[Array, "n B T D"]:
    """Returns the decoder's input, and the output of each of its layers, before the final norm: n
    is L + 1. The batch is that of `VLM.prefill`."""
    _, sown = model.apply(variables, batch, "pixels", method="_hidden", mutable=SOWN)
    llm = sown[SOWN]["llm"]
    # A module may sow more than once under a name: each is a tuple, here of one array.
    [input_BTD] = llm["input"]
    [output_LBTD] = llm["blocks"]["output"]
    return jnp.concatenate([input_BTD[None], output_LBTD])


def abstract_batch(
    model: ModelConfig, data: DataConfig, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a batch of so many packed sequences, over all devices: tokens
    [B, T], tiles [B, I, Y, X, C], patch labels [B, I, P, k]."""
    vision = model.vision
    tokens = (batch_size, data.seq_len)
    patches = (batch_size, data.max_tiles, vision.num_patches)
    tiles = (batch_size, data.max_tiles, vision.tile_height, vision.tile_width, NUM_CHANNELS)
    shapes = {
        "tokens": (tokens, np.int32),
        "targets": (tokens, np.int32),
        "loss_weights": (tokens, np.float32),
        "positions": (tokens, np.int32),
        "segment_ids": (tokens, np.int32),
        # A quarter of float32's bytes on the way to the devices, where the encoder normalises them.
        "tiles": (tiles, np.uint8),
        "patch_label_ids": ((*patches, data.max_patch_labels), np.int32),
        "patch_label_weights": ((*patches, data.max_patch_labels), np.float32),
        "patch_loss_weights": (patches, np.float32),
    }
    if data.blank_contrast:
        shapes["kept_patches"] = (patches, np.bool_)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def init_params(model: VLM, rng: jax.Array) -> dict[str, Any]:
    """Returns initialised parameters, boxed with their logical axes, under "vision", "connector"
    and "llm".

    Connector parameters that start from the LLM are made of the LLM as initialised. Call it inside
    `jax.eval_shape` or `jax.jit`: Flax initialises a module while it reads a batch, which is zeros
    here and is never computed. No parameter depends on the batch, nor on its shapes.
    """
    # A sequence for each device of the mesh entered: one alone would not divide over data x fsdp,
    # as the sharding constraints of activations demand. Without a mesh the size is 0.
    batch_size = max(jax.sharding.get_abstract_mesh().size, 1)
    batch = abstract_batch(model.config, DataConfig(seq_len=INIT_LENGTH, max_tiles=1), batch_size)
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in batch.items()}
    return with_llm_derived(model.config, model.init(rng, zeros)["params"])


def with_llm_derived(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Returns params, boxed or not, in which connector parameters that start from the LLM are made
    anew of the LLM in `params`.

    Raises:
      UserError: such a parameter is of another shape than what it starts from.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    for path, new in llm_derived(config, nn.meta.unbox(params["llm"])).items():
        shape = nn.meta.unbox(leaves[path]).shape
        if shape != new.shape:
            raise UserError(
                f"{path} is {shape} and what it starts from in the LLM is {new.shape}: they must "
                "be equal"
            )
        # The new value takes over the box, and with it the logical axes.
        leaves[path] = nn.meta.replace_boxed({"": leaves[path]}, {"": new})[""]
    return traverse_util.unflatten_dict(leaves, sep="/")


def llm_derived(config: ModelConfig, llm: dict[str, Any]) -> dict[str, Array]:
    """Returns, by path, the connector parameters that start as a function of the LLM's, made of
    `llm`."""
    made = connectors.get(config.connector.name).init_from_llm(llm, config.connector)
    return traverse_util.flatten_dict({"connector": made}, sep="/") if made else {}


def llm_derived_paths(config: ModelConfig, llm: dict[str, Any]) -> set[str]:
    """Returns the paths of the parameters that `llm_derived` makes; nothing is computed."""
    return set(jax.eval_shape(functools.partial(llm_derived, config), llm))


def pruning(kept: Bool[Array, "V"]) -> dict[str, Any]:
    """Returns the variables that, beside the parameters, prune the patches to these vocabulary
    entries; only for connectors that give patches a distribution over the vocabulary."""
    collection, name = VOCABULARY_SUBSET
    return {collection: {"connector": {name: kept}}}


def keeping(entries: Int[Array, "P k"]) -> dict[str, Any]:
    """Returns the variables that, beside the parameters, give each patch of a tile the vocabulary
    entries that its visual token is the average of, in the place of its likeliest; -1 is none. Only
    for connectors that give patches a distribution over the vocabulary."""
    collection, name = KEPT_ENTRIES
    return {collection: {"connector": {name: entries}}}
