"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786), NaFlex too: SiglipVisionModel of
Hugging Face, alone or inside a SiglipModel."""

import functools
import math
from typing import Any

import numpy as np

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.families.base import (
    ACTIVATIONS,
    Fields,
    VisionFamily,
    read_vision,
    vision_blocks,
)
from alignvlm_jax.weights.mapping import Entry
from alignvlm_jax.weights.source import Derived, Made, Source, Tensor, Tower, resample

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
PREFIX = "vision_model."
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "num_patches": 256,
}
"""Of SiglipVisionConfig, the last of Siglip2VisionConfig. Transformers before 4.51 leaves out of a
nested config what is its class's default: of google/siglip-base-patch16-224 all of it."""
CONVOLUTION = "yxCE -> ECyx"
FLAT = "yxCE -> E(yxC)"
"""Axes of the patch embedding: a convolution's, and NaFlex's, which is a matrix."""
# The pooling head, the text tower, temperature and bias of the loss, and indices of positions.
IGNORED = (r"(.*\.)?head\..*", r"text_model\..*", r"logit_(scale|bias)", r".*\.position_ids")


class Siglip(VisionFamily):
    """Encoders whose patches have learned positions and no class token."""

    model_types = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
    class_name = "SiglipVisionModel"

    def read(self, fields: Fields, tile_size: int | None) -> VisionConfig:
        """See VisionFamily."""
        own_size = _own_size(fields)
        fields = _vision_fields(fields)
        return read_vision(
            fields,
            own_size,
            tile_size,
            mlp_width=fields.integer("intermediate_size"),
            gelu="gelu_pytorch_tanh",
            mean=MEAN,
            std=STD,
        )

    def tower(self, source: Source, config: VisionConfig, fields: Fields) -> Tower:
        """See VisionFamily."""
        # The encoder alone, as some save it, has no prefix.
        prefix = PREFIX if any(name.startswith(PREFIX) for name in source.tensors) else ""
        entries = table(prefix, FLAT if _is_naflex(fields) else CONVOLUTION)
        side = _own_size(fields) // config.patch_height
        positions = f"{prefix}embeddings.position_embedding.weight"
        # A table that is missing is left to `load.check_tower`, which names it.
        if (side, side) != config.patch_grid and positions in source.tensors:
            tensor = Tensor((config.num_patches, config.width), np.dtype(np.float32))
            method = "bilinear" if _is_naflex(fields) else "bicubic"
            make = functools.partial(
                resample, old=(side, side), new=config.patch_grid, method=method
            )
            source = Derived(source, {positions: Made(tensor, (positions,), make)})
        return Tower(source, config, entries, IGNORED)

    def refusal(self, config: VisionConfig) -> str:
        """See VisionFamily."""
        for name in ("tile", "patch"):
            height = getattr(config, f"{name}_height")
            width = getattr(config, f"{name}_width")
            if height != width:
                return (
                    f"a {self.class_name} has square tiles and patches; "
                    f"config.model.vision.{name}_height is {height} and {name}_width {width}"
                )
        return ""

    def hf_config(self, config: VisionConfig) -> dict[str, Any]:
        """See VisionFamily."""
        names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        return {
            "architectures": [self.class_name],
            "model_type": "siglip_vision_model",
            "image_size": config.tile_height,
            "patch_size": config.patch_height,
            "num_channels": 3,
            "hidden_size": config.width,
            "intermediate_size": config.mlp_width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "hidden_act": names[config.gelu],
            "layer_norm_eps": config.norm_eps,
            "attention_dropout": 0.0,
            "vision_use_head": False,
        }

    def preprocessor(self, config: VisionConfig) -> dict[str, Any]:
        """See VisionFamily."""
        return {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": config.tile_height, "width": config.tile_width},
            "do_resize": True,
            "resample": 3,  # Bicubic, as PIL numbers it.
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.pixel_mean),
            "image_std": list(config.pixel_std),
        }

    def entries(self) -> tuple[Entry, ...]:
        """See VisionFamily."""
        return table()


def table(prefix: str = PREFIX, patch_embedding: str = CONVOLUTION) -> tuple[Entry, ...]:
    """Returns the table of SiglipVisionModel.

    Args:
      prefix: what all names begin with.
      patch_embedding: axes of the patch embedding, CONVOLUTION or FLAT.
    """
    embeddings = f"{prefix}embeddings"
    return (
        Entry("vision/patch_embed/kernel", f"{embeddings}.patch_embedding.weight", patch_embedding),
        Entry("vision/patch_embed/bias", f"{embeddings}.patch_embedding.bias", "E -> E"),
        Entry("vision/positions", f"{embeddings}.position_embedding.weight", "PE -> PE"),
        *vision_blocks(
            f"{prefix}encoder.layers.{{}}",
            norms=("layer_norm1", "layer_norm2"),
            attention=tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
            mlp=("mlp.fc1", "mlp.fc2"),
        ),
        Entry("vision/final_norm/scale", f"{prefix}post_layernorm.weight", "E -> E"),
        Entry("vision/final_norm/bias", f"{prefix}post_layernorm.bias", "E -> E"),
    )


def _is_naflex(fields: Fields) -> bool:
    # SigLIP 2 of a fixed resolution is published as a SiglipModel: the type tells, and not a
    # num_patches, which some write beside image_size.
    return fields["model_type"].startswith("siglip2")


def _vision_fields(fields: Fields) -> Fields:
    """The encoder's own fields, completed by the defaults of its class."""
    if fields["model_type"] in ("siglip", "siglip2"):
        # What stands outside of the group is the text tower's, or stale.
        fields = fields.within("vision_config") or Fields(fields.path, {})
    return fields.over(DEFAULTS)


def _own_size(fields: Fields) -> int:
    """Pixels a side of the patches that the encoder was trained on; what is left of the image
    beyond them no patch sees."""
    own = _vision_fields(fields)
    patch = own.integer("patch_size", at_least=1)
    if not _is_naflex(fields):
        return own.integer("image_size") // patch * patch
    side = math.isqrt(own.integer("num_patches"))
    if side**2 != own["num_patches"]:
        raise UserError(f"{own.path}: num_patches is {own['num_patches']}, which is no square")
    return side * patch
