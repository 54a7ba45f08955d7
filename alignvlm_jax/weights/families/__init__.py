"""Families of published towers, a file each. Adding one is its file and a line here."""

from pathlib import Path

from alignvlm_jax.config import LLMConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.families.base import Fields, LLMFamily, VisionFamily
from alignvlm_jax.weights.families.dinov2 import Dinov2
from alignvlm_jax.weights.families.llama import Llama
from alignvlm_jax.weights.families.qwen import Qwen2, Qwen3
from alignvlm_jax.weights.families.siglip import Siglip
from alignvlm_jax.weights.formats.safetensors_folder import SafetensorsFolder
from alignvlm_jax.weights.source import Tower

LLMS: tuple[LLMFamily, ...] = (
    Llama(),
    Qwen2(),
    Qwen3(),
)
VISION: tuple[VisionFamily, ...] = (
    Siglip(),
    Dinov2(),
)


def open_llm(folder: Path) -> Tower:
    """Opens a language model of LLMS in a Hugging Face folder; only headers are read.

    Raises:
      UserError: another architecture, or one of its options that we do not have; files missing or
        damaged.
    """
    fields = Fields(folder / "config.json")
    known = {family.model_type: family for family in LLMS}
    family = known[fields.choose("model_type", tuple(known), None)]
    config = family.read(fields)
    return Tower(SafetensorsFolder(folder), config, family.entries(config), family.ignored(config))


def open_vision(folder: Path, tile_size: int | None = None) -> Tower:
    """Opens an encoder of VISION in a Hugging Face folder, alone or beside a text tower; only
    headers are read.

    Args:
      tile_size: pixels a side; another than the encoder's own has its positions resampled.

    Raises:
      UserError: as `open_llm`; or `tile_size` is no multiple of the patch.
    """
    fields = Fields(folder / "config.json")
    known = {name: family for family in VISION for name in family.model_types}
    family = known[fields.choose("model_type", tuple(known), None)]
    config = family.read(fields, tile_size)
    return family.tower(SafetensorsFolder(folder), config, fields)


def llm_of_gguf(path: Path, architecture: str | None) -> LLMFamily:
    """Returns the family of a GGUF file's `general.architecture`.

    Raises:
      UserError: there is none.
    """
    known = {family.gguf_architecture: family for family in LLMS}
    if architecture not in known:
        raise UserError(
            f"{path}: general.architecture is {architecture!r}; read are: "
            f"{', '.join(map(repr, known))}"
        )
    return known[architecture]


def llm_of(config: LLMConfig) -> LLMFamily:
    """Returns the family whose decoder is that of `config`.

    Raises:
      UserError: there is none.
    """
    defaults = LLMConfig()
    names = sorted({name for family in LLMS for name in family.traits})
    traits = {name: getattr(config, name) for name in names}
    for family in LLMS:
        # All traits count, also those at their default: biases and norms of queries together are of
        # no family.
        if traits == {name: family.traits.get(name, getattr(defaults, name)) for name in names}:
            return family
    found = ", ".join(f"config.model.llm.{name} {value}" for name, value in traits.items())
    known = ", ".join(family.class_name for family in LLMS)
    raise UserError(f"llm: no family has {found} together; written are: {known}")


def vision_of(config: VisionConfig) -> VisionFamily:
    """Returns the first family whose class expresses an encoder.

    Raises:
      UserError: there is none, and why.
    """
    # An encoder that was read as another family's is by now a SigLIP: what made it differ has been
    # folded into its weights.
    refusals = [family.refusal(config) for family in VISION]
    for family, refusal in zip(VISION, refusals, strict=True):
        if not refusal:
            return family
    raise UserError(f"vision: {refusals[0]}")
