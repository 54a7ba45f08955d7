"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786), NaFlex too: SiglipVisionModel of
Hugging Face, alone or inside a SiglipModel."""

import functools
from typing import Any

import numpy as np

from alignvlm_jax.config import VisionConfig
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
        fields = fields.within("vision_config") or fields
        return read_vision(
            fields,
            _own_size(fields),
            tile_size,
            mlp_width=fields["intermediate_size"],
            gelu="gelu_pytorch_tanh",
            mean=MEAN,
            std=STD,
        )

    def tower(self, source: Source, config: VisionConfig, fields: Fields) -> Tower:
        """See VisionFamily."""
        fields = fields.within("vision_config") or fields
        # The encoder alone, as some save it, has no prefix.
        prefix = PREFIX if any(name.startswith(PREFIX) for name in source.tensors) else ""
        entries = table(prefix, FLAT if _is_naflex(fields) else CONVOLUTION)
        side = _own_size(fields) // config.patch_height
        positions = f"{prefix}embeddings.position_embedding.weight"
        # A table that is missing is left to `load.check_tower`, which names it.
        if (side, side) != config.patch_grid and positions in source.tensors:
            tensor = Tensor((config.num_patches, config.width), np.dtype(np.float32))
            make = functools.partial(
                resample, old=(side, side), new=config.patch_grid, method="bicubic"
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
        names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
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
    # SigLIP 2 of a fixed resolution is published as a SiglipModel, and names no number of patches.
    return fields.get("num_patches") is not None


def _own_size(fields: Fields) -> int:
    """Pixels a side of the patches that the encoder was trained on; what is left of the image
    beyond them no patch sees."""
    patch = fields["patch_size"]
    if _is_naflex(fields):
        return round(fields["num_patches"] ** 0.5) * patch
    return fields["image_size"] // patch * patch
