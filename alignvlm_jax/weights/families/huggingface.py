"""Towers from Hugging Face folders: what config.json says, in our terms, and the table of names
that goes with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from alignvlm_jax.config import LLMConfig, RopeScaling, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import mapping
from alignvlm_jax.weights.families import dinov2
from alignvlm_jax.weights.formats.safetensors_folder import SafetensorsFolder, read_json
from alignvlm_jax.weights.source import Derived, Made, Source, Tensor, Tower, resample

LLM_TYPES = ("llama",)
VISION_TYPES = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model", "dinov2")
ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu": "exact"}
SIGLIP_IGNORED = (r"(.*\.)?head\..*", r"text_model\..*", r"logit_(scale|bias)", r".*\.position_ids")


def open_llm(folder: Path) -> Tower:
    """Opens a LlamaForCausalLM; only headers are read.

    Raises:
      UserError: another architecture, or one of its options that we do not have; files missing or
        damaged.
    """
    fields = _Fields(folder / "config.json")
    fields.choose("model_type", LLM_TYPES, None)
    fields.choose("hidden_act", ("silu",), "silu")
    for name in ("attention_bias", "mlp_bias"):
        fields.choose(name, (False,), False)
    theta, scaling = _rope(fields)
    width = fields["hidden_size"]
    num_heads = fields["num_attention_heads"]
    config = LLMConfig(
        vocab_size=fields["vocab_size"],
        width=width,
        mlp_width=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads") or num_heads,
        head_dim=fields.get("head_dim") or width // num_heads,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )
    # A tied head is written out by some: it is the table once more.
    ignored = (r".*\.rotary_emb\.inv_freq", *(("lm_head.weight",) if config.tie_embeddings else ()))
    return Tower(SafetensorsFolder(folder), config, mapping.llama(config), ignored)


def open_vision(folder: Path, tile_size: int | None = None) -> Tower:
    """Opens a SigLIP, SigLIP 2 or DINOv2 encoder, alone or inside a SiglipModel; only headers are
    read.

    Args:
      tile_size: pixels a side, another than the encoder's own has its positions resampled.

    Raises:
      UserError: as `open_llm`; or `tile_size` is no multiple of the patch.
    """
    fields = _Fields(folder / "config.json")
    family = fields.choose("model_type", VISION_TYPES, None)
    fields = fields.within("vision_config") or fields
    patch = fields["patch_size"]
    is_naflex = family.startswith("siglip2") and fields.get("num_patches") is not None
    own_size = (
        round(fields["num_patches"] ** 0.5) * patch
        if is_naflex
        else fields["image_size"] // patch * patch
    )
    size = tile_size or own_size
    if size % patch:
        raise UserError(f"--tile_size {size} is not a multiple of the patch of {folder}, {patch}; "
                        f"nearest: {max(1, round(size / patch)) * patch}")  # fmt: skip
    is_dinov2 = family == "dinov2"
    gelu = ACTIVATIONS[
        fields.choose(
            "hidden_act", tuple(ACTIVATIONS), "gelu" if is_dinov2 else "gelu_pytorch_tanh"
        )
    ]
    mean, std = _normalisation(
        folder, (dinov2.MEAN, dinov2.STD) if is_dinov2 else ((0.5,) * 3, (0.5,) * 3)
    )
    mlp_width = (
        round(fields["hidden_size"] * fields.get("mlp_ratio", 4))
        if is_dinov2
        else fields["intermediate_size"]
    )
    config = VisionConfig(
        tile_height=size,
        tile_width=size,
        patch_height=patch,
        patch_width=patch,
        width=fields["hidden_size"],
        mlp_width=mlp_width,
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        norm_eps=fields.get("layer_norm_eps", 1e-6),
        gelu=gelu,
        pixel_mean=mean,
        pixel_std=std,
    )
    source = SafetensorsFolder(folder)
    if is_dinov2:
        fields.choose("use_swiglu_ffn", (False,), False)
        fields.choose("qkv_bias", (True,), True)
        return dinov2.tower(source, config)
    prefix = (
        "vision_model." if any(name.startswith("vision_model.") for name in source.tensors) else ""
    )
    entries = mapping.siglip(prefix, "yxCE -> E(yxC)") if is_naflex else mapping.siglip(prefix)
    positions = f"{prefix}embeddings.position_embedding.weight"
    return Tower(
        _resampled(source, positions, (own_size // patch,) * 2, config),
        config,
        entries,
        SIGLIP_IGNORED,
    )


class _Fields:
    """A config.json; every complaint names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None):
        self._path = path
        self._values = read_json(path) if values is None else values

    def __getitem__(self, name: str) -> Any:
        if self._values.get(name) is None:
            raise UserError(f"{self._path} does not say {name}")
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def within(self, name: str) -> "_Fields | None":
        """The group of fields `name`, where there is one."""
        values = self._values.get(name)
        return _Fields(self._path, values) if isinstance(values, dict) else None

    def choose(self, name: str, known: tuple, default: Any) -> Any:
        """The value of a field that must be one of `known`."""
        value = self.get(name, default)
        if value not in known:
            raise UserError(
                f"{self._path}: {name} is {value!r}; read are: {', '.join(map(repr, known))}"
            )
        return value


def _rope(fields: _Fields) -> tuple[float, RopeScaling]:
    """Of transformers 5 (rope_parameters), or 4 (rope_theta and rope_scaling)."""
    rope = fields.within("rope_parameters") or fields.within("rope_scaling") or fields
    theta = float(rope.get("rope_theta") or fields.get("rope_theta", 10000.0))
    kind = "rope_type" if rope.get("rope_type") else "type"
    if rope is fields or rope.choose(kind, ("default", "llama3"), "default") == "default":
        return theta, RopeScaling()
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_length=int(rope["original_max_position_embeddings"]),
    )


def _normalisation(
    folder: Path, default: tuple[tuple, tuple]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / "preprocessor_config.json"
    fields = read_json(path) if path.exists() else {}
    return tuple(fields.get("image_mean", default[0])), tuple(fields.get("image_std", default[1]))


def _resampled(source: Source, name: str, grid: tuple[int, int], config: VisionConfig) -> Source:
    if grid == config.patch_grid or name not in source.tensors:
        return source
    tensor = Tensor((config.num_patches, config.width), np.dtype(np.float32))
    make = lambda table: resample(table, grid, config.patch_grid, "bicubic")  # noqa: E731
    return Derived(source, {name: Made(tensor, (name,), make)})
