"""The contract of a family of published towers: config.json read in our terms, the table of names,
and the config.json of an export.

A family is one file with a class of `LLMFamily` or `VisionFamily`, and one line in the registry.
"""

import abc
import math
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
      path: of the file.
    """

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None):
        self.folder = path.parent
        self.path = path
        # A group is read from the file once, by whoever has opened that.
        self._values = read_json(path) if values is None else values

    def __contains__(self, name: str) -> bool:
        """Whether a field is there, also where it is null."""
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        if self._values.get(name) is None:
            raise UserError(f"{self.path} does not say {name}")
        return self._values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a field, or `default` where it is absent or null."""
        value = self._values.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a field that is a number; without a default it must be there.

        Raises:
          UserError: it is missing, or no number: "1e-05" is a text.
        """
        value = float(self._typed(name, default, (int, float), "a number"))
        # JSON as Python reads it has Infinity, and 1e999.
        if not math.isfinite(value):
            raise UserError(f"{self.path}: {name} is {value}; it must be a finite number")
        return value

    def integer(self, name: str, default: int | None = None, at_least: int = 0) -> int:
        """Returns a field that is a whole number of at least so much, as `number`."""
        value = self._typed(name, default, (int,), "a whole number")
        if value < at_least:
            raise UserError(f"{self.path}: {name} is {value}; it must be at least {at_least}")
        return value

    def texts(self, name: str) -> list[str]:
        """Returns a field that is a list of texts, empty where it is absent or null; UserError
        where it is anything else."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise UserError(f"{self.path}: {name} is {value!r}; it must be a list of texts")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Returns a field that is true or false.

        Raises:
          UserError: it is neither: "false" is a text, and would count as true.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.path}: {name} is {value!r}; it must be true or false")
        return value

    def _typed(self, name: str, default: Any, types: tuple[type, ...], what: str) -> Any:
        value = self[name] if default is None else self.get(name, default)
        # true and false are whole numbers to Python.
        if not isinstance(value, types) or isinstance(value, bool):
            raise UserError(f"{self.path}: {name} is {value!r}; it must be {what}")
        return value

    def over(self, defaults: Mapping[str, Any]) -> "Fields":
        """Returns the fields, completed by the defaults of their class."""
        return Fields(self.path, {**defaults, **self._values})

    def within(self, name: str) -> "Fields | None":
        """Returns the group of fields `name`, or None where there is none."""
        values = self._values.get(name)
        return Fields(self.path, values) if isinstance(values, dict) else None

    def choose(self, name: str, known: tuple, default: Any) -> Any:
        """Returns the value of a field that must be one of `known`.

        Raises:
          UserError: it is another.
        """
        value = self.get(name, default)
        if value not in known:
            raise UserError(
                f"{self.path}: {name} is {value!r}; read are: {', '.join(map(repr, known))}"
            )
        return value


class LLMFamily(abc.ABC):
    """A family of language models that our decoder computes.

    Attributes:
      model_type: of its config.json.
      class_name: the class of transformers that its export is.
      traits: the fields of LLMConfig that tell its decoder from those of other families; a field
        that it does not name has the default. By whether they are set an export finds its family,
        the first in the registry: a Mistral is written as the Llama that it is.
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


ACTIVATIONS = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "exact"}
"""Published names of `VisionConfig.gelu`; the first of each is written."""


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
    fields.choose("num_channels", (3,), 3)
    patch = fields.integer("patch_size", at_least=1)
    size = own_size if tile_size is None else tile_size
    # A convolution would leave the rest of the tile unseen, without a word.
    if size % patch:
        nearest_size = max(1, round(size / patch)) * patch
        raise UserError(
            f"--tile_size {size} is not a multiple of the patch of {fields.folder}, {patch}; "
            f"nearest: {nearest_size}"
        )
    pixel_mean, pixel_std = read_pixels(fields.folder, mean, std)
    return VisionConfig(
        tile_height=size,
        tile_width=size,
        patch_height=patch,
        patch_width=patch,
        width=fields.integer("hidden_size"),
        mlp_width=mlp_width,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        norm_eps=fields.number("layer_norm_eps", 1e-6),
        gelu=ACTIVATIONS[fields.choose("hidden_act", tuple(ACTIVATIONS), gelu)],
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def read_pixels(
    folder: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the deviation of pixels from 0 to 1 that a folder's image processor has.

    Transformers 5 writes it into processor_config.json, which then goes before what transformers 4
    wrote, preprocessor_config.json. Another factor of rescaling, none, or no normalisation is
    expressed by other means and deviations.

    Args:
      mean: where no file has one; std likewise.

    Raises:
      UserError: an offset, or what is no number.
    """
    # Some encoders are published with other statistics than their class's own.
    nested = None
    if (folder / "processor_config.json").exists():
        nested = Fields(folder / "processor_config.json").within("image_processor")
    path = folder / "preprocessor_config.json"
    fields = nested or Fields(path, None if path.exists() else {})
    for name in ("offset", "rescale_offset"):
        fields.choose(name, (False,), False)
    # x factor - mean over std, of pixels x from 0 to 255, is x / 255 - mean / scale over std /
    # scale.
    factor = fields.number("rescale_factor", 1 / 255) if fields.flag("do_rescale", True) else 1.0
    scale = 255 * factor
    # Written so that NaN is refused as well: it compares with nothing.
    if not scale > 0:
        raise UserError(f"{fields.path}: rescale_factor is {factor}; it must be above 0")
    if not fields.flag("do_normalize", True):
        return (0.0,) * 3, (1 / scale,) * 3
    means = _channels(fields, "image_mean", mean)
    stds = _channels(fields, "image_std", std)
    return tuple(x / scale for x in means), tuple(x / scale for x in stds)


def _channels(fields: Fields, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A field of three numbers, or of one that stands for all three; null is none."""
    values = fields.get(name, None if name in fields else default)
    values = values if isinstance(values, (list, tuple)) else (values,) * 3
    if len(values) != 3 or not all(type(x) in (int, float) for x in values):
        raise UserError(f"{fields.path}: {name} is {values!r}; it must be a number, or three")
    return tuple(map(float, values))


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
