"""The contract of a family of published towers: config.json read in our terms, the table of names,
and the config.json of an export.

A family is one file with a class of `LLMFamily` or `VisionFamily`, and one line in the registry.
"""

import abc
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from alignvlm_jax.config import LLMConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.formats.safetensors_folder import read_json
from alignvlm_jax.weights.mapping import Entry
from alignvlm_jax.weights.source import Source, Tower


class Fields:
    """A config.json, or a group of fields within it; every complaint names the file and the field.

    Attributes:
      folder: where the file lies.
    """

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None):
        self.folder = path.parent
        self._path = path
        self._values = read_json(path) if values is None else values

    def __getitem__(self, name: str) -> Any:
        if self._values.get(name) is None:
            raise UserError(f"{self._path} does not say {name}")
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a field, or `default` where it is absent or null."""
        value = self._values.get(name)
        return default if value is None else value

    def within(self, name: str) -> "Fields | None":
        """Returns the group of fields `name`, or None where there is none."""
        values = self._values.get(name)
        return Fields(self._path, values) if isinstance(values, dict) else None

    def choose(self, name: str, known: tuple, default: Any) -> Any:
        """Returns the value of a field that must be one of `known`.

        Raises:
          UserError: it is another.
        """
        value = self.get(name, default)
        if value not in known:
            raise UserError(
                f"{self._path}: {name} is {value!r}; read are: {', '.join(map(repr, known))}"
            )
        return value


class LLMFamily(abc.ABC):
    """A family of language models that our decoder computes.

    Attributes:
      model_type: of its config.json.
      class_name: the class of transformers that its export is.
      traits: the fields of LLMConfig that tell its decoder from those of other families; a field
        that it does not name has the default. No two families may have the same: by them an export
        finds its family.
      gguf_architecture: `general.architecture` of its GGUF files.
      gguf_pairs_neighbours: whether a GGUF of it lays the channels that rotate together beside
        each other (2i, 2i + 1), where ours are half a head apart (i, i + h/2).
    """

    model_type: ClassVar[str]
    class_name: ClassVar[str]
    traits: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    gguf_architecture: ClassVar[str]
    gguf_pairs_neighbours: ClassVar[bool] = False

    @abc.abstractmethod
    def read(self, fields: Fields) -> LLMConfig:
        """Returns the sizes that a config.json gives.

        Raises:
          UserError: a field is missing, or has a value that our decoder does not compute.
        """

    @abc.abstractmethod
    def entries(self, config: LLMConfig) -> tuple[Entry, ...]:
        """Returns the table of names: which of its tensors is which of our parameters."""

    @abc.abstractmethod
    def hf_config(self, config: LLMConfig) -> dict[str, Any]:
        """Returns the config.json of an export, from which `read` makes `config` again."""

    def ignored(self, config: LLMConfig) -> tuple[str, ...]:
        """Returns regular expressions (fullmatch) of tensors that are known and not needed."""
        return ()


class VisionFamily(abc.ABC):
    """A family of vision encoders that our ViT computes.

    Attributes:
      model_types: of its config.json, alone or inside a model with a text tower.
      class_name: the class of transformers that its export is.
    """

    model_types: ClassVar[tuple[str, ...]]
    class_name: ClassVar[str]

    @abc.abstractmethod
    def read(self, fields: Fields, tile_size: int | None) -> VisionConfig:
        """Returns the sizes that a config.json gives, with tiles of `tile_size` pixels a side;
        None: those that it was trained on.

        Raises:
          UserError: a field is missing or has a value that our ViT does not compute, or `tile_size`
            is no multiple of the patch.
        """

    @abc.abstractmethod
    def tower(self, source: Source, config: VisionConfig, fields: Fields) -> Tower:
        """Returns the tower of `source`, its positions resampled to the tiles of `config`.

        Raises:
          UserError: the source is no encoder of this family.
        """

    def refusal(self, config: VisionConfig) -> str:
        """Returns why no class of this family expresses an encoder; empty where one does."""
        return f"{self.class_name} is read and not written"

    def hf_config(self, config: VisionConfig) -> dict[str, Any]:
        """Returns the config.json of an export; only where `refusal` is empty."""
        raise NotImplementedError

    def preprocessor(self, config: VisionConfig) -> dict[str, Any]:
        """Returns the preprocessor_config.json of an export; only where `refusal` is empty."""
        raise NotImplementedError

    def entries(self) -> tuple[Entry, ...]:
        """Returns the table of names of an export; only where `refusal` is empty."""
        raise NotImplementedError


ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu": "exact"}
"""Published names of `VisionConfig.gelu`."""


def read_vision(
    fields: Fields,
    own_size: int,
    tile_size: int | None,
    *,
    mlp_width: int,
    gelu: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> VisionConfig:
    """Returns the config of an encoder with square tiles and patches.

    Args:
      own_size: pixels a side of the tiles that it was trained on.
      tile_size: pixels a side of those asked for; None: its own.
      gelu: published name of the activation, where config.json gives none.
      mean: pixels are normalised by it, and by `std`, where there is no preprocessor_config.json.

    Raises:
      UserError: a field is missing, or `tile_size` is no multiple of the patch.
    """
    patch = fields["patch_size"]
    size = own_size if tile_size is None else tile_size
    if size % patch:
        nearest_size = max(1, round(size / patch)) * patch
        raise UserError(
            f"--tile_size {size} is not a multiple of the patch of {fields.folder}, {patch}; "
            f"nearest: {nearest_size}"
        )
    path = fields.folder / "preprocessor_config.json"
    pixels = read_json(path) if path.exists() else {}
    return VisionConfig(
        tile_height=size,
        tile_width=size,
        patch_height=patch,
        patch_width=patch,
        width=fields["hidden_size"],
        mlp_width=mlp_width,
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        norm_eps=fields.get("layer_norm_eps", 1e-6),
        gelu=ACTIVATIONS[fields.choose("hidden_act", tuple(ACTIVATIONS), gelu)],
        pixel_mean=tuple(pixels.get("image_mean", mean)),
        pixel_std=tuple(pixels.get("image_std", std)),
    )


def vision_blocks(
    layer: str, norms: tuple[str, str], attention: tuple[str, str, str, str], mlp: tuple[str, str]
) -> tuple[Entry, ...]:
    """Returns the table of the blocks of a PyTorch ViT: weights [out, in], one tensor a layer.

    Args:
      layer: the name of a layer, with {} for its number; the other names stand below it.
      norms: before attention, and before the MLP.
      attention: queries, keys, values, output.
      mlp: up, down.
    """
    entries = []
    for path, name in zip(("attn_norm", "mlp_norm"), norms, strict=True):
        entries += [
            Entry(f"vision/blocks/{path}/scale", f"{layer}.{name}.weight", "E -> E"),
            Entry(f"vision/blocks/{path}/bias", f"{layer}.{name}.bias", "E -> E"),
        ]
    # PyTorch's weights are [out, in], so that inputs come last: "EHh -> (Hh)E".
    linear = {
        **{
            f"attn/{part}": (name, "EHh -> (Hh)E", "Hh -> (Hh)")
            # The fourth name is that of the output, with axes of its own.
            for part, name in zip("qkv", attention, strict=False)
        },
        "attn/o": (attention[3], "HhE -> E(Hh)", "E -> E"),
        "mlp/up": (mlp[0], "EF -> FE", "F -> F"),
        "mlp/down": (mlp[1], "FE -> EF", "E -> E"),
    }
    for path, (name, kernel, bias) in linear.items():
        entries += [
            Entry(f"vision/blocks/{path}/kernel", f"{layer}.{name}.weight", kernel),
            Entry(f"vision/blocks/{path}/bias", f"{layer}.{name}.bias", bias),
        ]
    return tuple(entries)
