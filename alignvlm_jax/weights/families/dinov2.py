"""DINOv2 (arXiv 2304.07193) in the shape of our encoder, from the tensors of a Dinov2Model.

Layer scale is folded into the layers before it, exactly; the class token is dropped, so that
features differ a little from those that it would have attended to; positions are resampled to the
tile.
"""

import numpy as np

from alignvlm_jax.config import VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.families.base import Fields, VisionFamily, read_vision, vision_blocks
from alignvlm_jax.weights.mapping import Entry
from alignvlm_jax.weights.source import Derived, Made, Source, Tensor, Tower, resample

POSITIONS = "embeddings.position_embeddings"
# The class token, and what stands for masked patches in its training.
IGNORED = (r"embeddings\.cls_token", r"embeddings\.mask_token")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ATTENTION_NAMES = (
    (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
    ),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
)
"""Below a layer: of transformers 4, and of 5."""


class Dinov2(VisionFamily):
    """Encoders without register tokens, and with an MLP of two layers."""

    model_types = ("dinov2",)
    class_name = "Dinov2Model"

    def read(self, fields: Fields, tile_size: int | None) -> VisionConfig:
        """See VisionFamily."""
        fields.choose("use_swiglu_ffn", (False,), False)
        fields.choose("qkv_bias", (True,), True)
        patch = fields.integer("patch_size", at_least=1)
        return read_vision(
            fields,
            # Pixels beyond the last whole patch no patch sees.
            fields.integer("image_size") // patch * patch,
            tile_size,
            mlp_width=int(fields.integer("hidden_size") * fields.number("mlp_ratio", 4)),
            gelu="gelu",
            mean=MEAN,
            std=STD,
        )

    def tower(self, source: Source, config: VisionConfig, fields: Fields) -> Tower:
        """See VisionFamily."""
        return tower(source, config)


def tower(source: Source, sizes: VisionConfig) -> Tower:
    """Returns the tower; `sizes` has everything but the grid of the position table, which is
    resampled to its tiles.

    Raises:
      UserError: the source has no position table of a square grid.
    """
    names = next(
        (
            names
            for names in ATTENTION_NAMES
            if f"encoder.layer.0.{names[0]}.weight" in source.tensors
        ),
        None,
    )
    if names is None or POSITIONS not in source.tensors:
        raise UserError(
            f"{source.name} lacks {POSITIONS} or the attention of encoder.layer.0: is it a "
            "Dinov2Model?"
        )
    made = {POSITIONS: _positions(source, sizes)}
    for layer in range(sizes.num_layers):
        prefix = f"encoder.layer.{layer}"
        for scaled, scale in ((names[3], "layer_scale1"), ("mlp.fc2", "layer_scale2")):
            for part in ("weight", "bias"):
                name = f"{prefix}.{scaled}.{part}"
                by = f"{prefix}.{scale}.lambda1"
                if name in source.tensors and by in source.tensors:
                    # In float32, since the product of two rounded numbers has more digits than
                    # either.
                    tensor = source.tensors[name]._replace(dtype=np.dtype(np.float32))
                    made[name] = Made(tensor, (name, by), _scale)
    return Tower(Derived(source, made), sizes, table(*names), IGNORED)


def table(query: str, key: str, value: str, output: str) -> tuple[Entry, ...]:
    """Returns the table of Dinov2Model once its layer scale is folded into `output` and fc2, and
    its position table is [P, E]. The names of the attention's parts, below a layer, differ between
    versions of transformers."""
    patch_embedding = "embeddings.patch_embeddings.projection"
    return (
        Entry("vision/patch_embed/kernel", f"{patch_embedding}.weight", "yxCE -> ECyx"),
        Entry("vision/patch_embed/bias", f"{patch_embedding}.bias", "E -> E"),
        Entry("vision/positions", POSITIONS, "PE -> PE"),
        *vision_blocks(
            "encoder.layer.{}",
            norms=("norm1", "norm2"),
            attention=(query, key, value, output),
            mlp=("mlp.fc1", "mlp.fc2"),
        ),
        Entry("vision/final_norm/scale", "layernorm.weight", "E -> E"),
        Entry("vision/final_norm/bias", "layernorm.bias", "E -> E"),
    )


def _scale(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Multiplies rows, which are outputs."""
    # lambda (W x + b): a weight [out, in] takes it as [out, 1], a bias [out] as it is.
    return array.astype(np.float32) * scale.astype(np.float32).reshape(-1, *(1,) * (array.ndim - 1))


def _positions(source: Source, sizes: VisionConfig) -> Made:
    _, count, width = source.tensors[POSITIONS].shape
    side = round((count - 1) ** 0.5)
    if side * side != count - 1:
        raise UserError(
            f"{source.name}: tensor {POSITIONS} has {count} positions, which is no square and a "
            "class token"
        )

    def make(table: np.ndarray) -> np.ndarray:
        # [1, 1 + P, E] -> [P, E]: the first position is the class token's.
        return resample(table[0, 1:], (side, side), sizes.patch_grid, "bicubic")

    return Made(Tensor((sizes.num_patches, width), np.dtype(np.float32)), (POSITIONS,), make)
