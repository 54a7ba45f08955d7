"""The fields of the model: frozen dataclasses, described by their comments as those of `fields`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignvlm_jax.config import options as connectors
from alignvlm_jax.config.options import ConnectorConfig

MISSING: Any = None
"""The default of a field that every config must give: `check` refuses it, and names the field. It
is of type Any, so that such a field keeps a type of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder, a SigLIP or one of its shape, which encodes each tile by itself. Defaults
    are those of SigLIP's own weights; sizes are usually a preset's."""

    tile_height: int = MISSING  # Pixels; a multiple of patch_height.
    tile_width: int = MISSING  # Pixels; a multiple of patch_width.
    patch_height: int = MISSING  # Pixels of a tile that make one patch.
    patch_width: int = MISSING  # Pixels of a tile that make one patch.
    width: int = MISSING  # Size of a patch feature; a multiple of num_heads.
    mlp_width: int = MISSING  # Hidden size of each layer's MLP.
    num_layers: int = MISSING  # Transformer layers.
    num_heads: int = MISSING  # Attention heads of a layer.
    norm_eps: float = 1e-6  # Added to the variance in each LayerNorm.
    gelu: str = "tanh"  # GELU of the MLPs: "tanh", its approximation, SigLIP's; "exact", DINOv2's.
    # Red, green and blue, subtracted from pixels that were scaled to 0..1.
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    # Red, green and blue, by which pixels are divided after that.
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a tile."""
        return self.tile_height // self.patch_height, self.tile_width // self.patch_width

    @property
    def num_patches(self) -> int:
        rows, columns = self.patch_grid
        return rows * columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary embedding's frequencies for long contexts."""

    # "llama3", Llama 3's; "linear", all frequencies alike; "yarn", YaRN (arXiv 2309.00071).
    type: str = "llama3"
    factor: float = 1.0  # Slow frequencies are divided by it; 1: no scaling.
    # Frequencies that turn fewer times than this within original_length are scaled in full.
    low_freq_factor: float = 1.0
    # Frequencies that turn more times than this are kept; those between are blended.
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0  # Factor of rotated queries and of rotated keys, YaRN's.
    original_length: int = 8192  # Tokens: the sequence length before the scaling.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """The language model, a decoder of Llama's shape. Sizes are usually a preset's, or those of the
    weights that `convert` read."""

    vocab_size: int = MISSING  # Rows of the embedding table, those of padding included.
    width: int = MISSING  # Size of a token embedding.
    mlp_width: int = MISSING  # Hidden size of each layer's gated MLP.
    num_layers: int = MISSING  # Transformer layers.
    num_heads: int = MISSING  # Query heads of a layer; a multiple of num_kv_heads.
    num_kv_heads: int = MISSING  # Key and value heads of a layer.
    head_dim: int = MISSING  # Size of a head; even, for the rotary embedding.
    norm_eps: float = 1e-5  # Added to the mean square in each RMSNorm.
    rope_theta: float = 10000.0  # Base of the rotary embedding's wavelengths.
    rope_scaling: RopeScaling = RopeScaling()
    tie_embeddings: bool = True  # The LM head is the embedding table.
    qkv_bias: bool = False  # Queries, keys and values have biases, as Qwen 2's.
    # Queries and keys are normalised by head before they are rotated, as Qwen 3's.
    qk_norm: bool = False
    # Every so many layers comes one without rotary positions, as SmolLM3's every fourth; 0: none.
    no_rope_every: int = 0
    # Rows at the end of the tables that are no token, so that vocab_size divides over a mesh.
    padded_rows: int = 0
    # Tokens of the longest sequence of the published weights, which an export names; 0: not known.
    context_length: int = dataclasses.field(default=0, compare=False)

    @property
    def unpadded_vocab_size(self) -> int:
        """Number of vocabulary entries: the tables' rows without the padding."""
        return self.vocab_size - self.padded_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model and how it is computed. Parameters are float32."""

    vision: VisionConfig = VisionConfig()
    llm: LLMConfig = LLMConfig()
    # Options of the connector chosen.
    connector: ConnectorConfig = dataclasses.field(default_factory=connectors.connector)
    # Options, by connector, that others would have where they are not the defaults:
    # `with_connector` takes them, and nothing else looks at them.
    connectors: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict, compare=False
    )
    # Token id that holds the place of an image token: the tokenizer's "<image>", or the first id
    # beyond its vocabulary where it has none.
    image_token_id: int = MISSING
    # Type of the computation: "float32", or "bfloat16", in which accelerators are fast.
    dtype: str = "float32"
    # Activations that the backward pass computes anew: "none", or "full", all within a layer, or
    # "dots", all but the results of matmuls; or all but what is named, joined by "+", of
    # "attention" (its output; splash is not run again then, cudnn is), "qkv" and "mlp" (gate, up).
    remat: str = "none"
    # Layers of a tower that are compiled in a row: 1 for large models; all of them make a small one
    # a third faster on CPU, and bfloat16 worth it there.
    scan_unroll: int = 1
    # How ALIGN and the loss go over the vocabulary: "plain", all of it at once, or "chunked", some
    # entries at a time; "auto": chunked where the logits are more than chunk_size_mib.
    vocab_impl: str = "auto"
    chunk_size_mib: float = 64.0  # MiB of logits that a chunk has on a device at most.
    # Kernel of training, prefill and the vision encoder: "xla", "cudnn", "splash", or "triton", for
    # packed sequences on GPU; "auto": splash on TPU, cudnn on GPU in bfloat16, else xla.
    attention: str = "auto"

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens that stand for one tile in a sequence: the count that data and model
        share."""
        return connectors.connector_class(self.connector.name).num_tokens(
            self.vision, self.connector
        )

    def with_connector(self, name: str) -> "ModelConfig":
        """Returns the model with another connector; UserError with the nearest name for none."""
        if name == self.connector.name:
            return self
        return dataclasses.replace(
            self, connector=connectors.connector(name, **self.connectors.get(name, {}))
        )
