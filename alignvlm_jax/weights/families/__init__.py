"""Families of published towers, a file each. Adding one is its file and a line here."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignvlm_jax.config import LLMConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights.families.base import Fields, LLMFamily, VisionFamily
from alignvlm_jax.weights.families.dinov2 import Dinov2
from alignvlm_jax.weights.families.llama import Llama
from alignvlm_jax.weights.families.mistral import Mistral
from alignvlm_jax.weights.families.qwen import Qwen2, Qwen3
from alignvlm_jax.weights.families.siglip import Siglip
from alignvlm_jax.weights.families.smollm3 import SmolLM3
from alignvlm_jax.weights.formats.safetensors_folder import SafetensorsFolder, check_folder
from alignvlm_jax.weights.source import Source, Tower, largest_difference

LLMS: tuple[LLMFamily, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    SmolLM3(),
)
VISION: tuple[VisionFamily, ...] = (
    Siglip(),
    Dinov2(),
)
_CLASS_TOKEN = "its encoder has a class token, and a norm before the first layer"
_GEMMA = "its norms, its scaled table, and its layers with a window are not computed"
_WHOLE = "it is a language model with an encoder already; take the folder of one of the two"
NOT_READ = {
    "clip": _CLASS_TOKEN,
    "clip_vision_model": _CLASS_TOKEN,
    "dinov2_with_registers": "register tokens are not computed; take DINOv2 without them",
    "dinov3_vit": "its rotary positions and register tokens are not computed",
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _WHOLE,
    "gemma3_text": _GEMMA,
    "llava": _WHOLE,
    "mixtral": "experts are not computed",
    "qwen2_5_vl": _WHOLE,
    "qwen2_vl": _WHOLE,
    "qwen3_moe": "experts are not computed",
}
"""Published types that people try, and why they are not read."""


def open_llm(folder: Path) -> Tower:
    """Opens a language model of LLMS in a Hugging Face folder; only headers are read.

    Raises:
      UserError: another architecture, or one of its options that we do not have; files missing or
        damaged.
    """
    fields = _fields(folder)
    family = _chosen(fields, {family.model_type: family for family in LLMS})
    source = SafetensorsFolder(folder)
    config, note = _with_head(source, family, family.read(fields))
    entries = family.entries(config)
    return Tower(source, config, entries, family.ignored(config), _found(fields, family), note)


def open_vision(folder: Path, tile_size: int | None = None) -> Tower:
    """Opens an encoder of VISION in a Hugging Face folder, alone or beside a text tower; only
    headers are read.

    Args:
      tile_size: pixels a side; another than the encoder's own has its positions resampled.

    Raises:
      UserError: as `open_llm`; or `tile_size` is no multiple of the patch.
    """
    fields = _fields(folder)
    family = _chosen(fields, {name: family for family in VISION for name in family.model_types})
    config = family.read(fields, tile_size)
    tower = family.tower(SafetensorsFolder(folder), config, fields)
    return dataclasses.replace(tower, found=_found(fields, family))


def _fields(folder: Path) -> Fields:
    # First: what is another thing than a model may well have a config.json that misleads.
    check_folder(folder)
    return Fields(folder / "config.json")


def _chosen(fields: Fields, known: Mapping[str, Any]) -> Any:
    """The family of a config.json, by its model_type."""
    name = fields.get("model_type")
    if isinstance(name, str) and name in NOT_READ:
        raise UserError(
            f"{fields.path}: model_type {name!r} is not read: {NOT_READ[name]}; read are: "
            f"{', '.join(map(repr, known))}"
        )
    return known[fields.choose("model_type", tuple(known), None)]


def _found(fields: Fields, family: LLMFamily | VisionFamily) -> str:
    """Which class a config.json names, for complaints about its tensors."""
    # model_type alone decides: some fine-tunes name a class of their own with the same tensors.
    names = fields.texts("architectures")
    if not names or family.class_name in names:
        return ""
    return f"config.json names the class {', '.join(names)}; read is {family.class_name}"


def _with_head(source: Source, family: LLMFamily, config: LLMConfig) -> tuple[LLMConfig, str]:
    """The sizes of a model that is tied by its config.json, but untied where a head is written
    that is another matrix than the table; and what is to be told about it.

    Some fine-tunes train a head of its own and keep the config.json of the model before.
    """
    untied = dataclasses.replace(config, tie_embeddings=False)
    names = {entry.path: entry.name for entry in family.entries(untied)}
    head = names["llm/head/kernel"]
    table = names["llm/embed/table"]
    if not config.tie_embeddings or not {head, table} <= source.tensors.keys():
        return config, ""
    difference = largest_difference(source, head, table)
    # Bit for bit: a head that was trained a little is another head.
    if not difference:
        return config, ""
    return untied, (
        f"{source.name}: tie_word_embeddings is true, but {head} differs from {table} by up to "
        f"{difference:.3g}: read as untied"
    )


def llm_of_gguf(path: Path, architecture: str | None) -> LLMFamily:
    """Returns the family of a GGUF file's `general.architecture`.

    Raises:
      UserError: there is none.
    """
    known: dict[str, LLMFamily] = {}
    for family in LLMS:
        # Of several with one name it is the first.
        known.setdefault(family.gguf_architecture, family)
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
        own = {name: family.traits.get(name, getattr(defaults, name)) for name in names}
        # All traits count, also those at their default: biases and norms of queries together are of
        # no family. An interval counts by whether there is one.
        if all(bool(traits[name]) == bool(own[name]) for name in names):
            return family
    found = ", ".join(f"config.model.llm.{name} {x}" for name, x in traits.items() if x)
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
