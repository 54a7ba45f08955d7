"""Back to the ecosystem: towers as Hugging Face folders, the connector as safetensors.

    llm/        LlamaForCausalLM, with the tokenizer's files     vision/   SiglipVisionModel,
    without its pooling head connector/  our own names, and the whole model's config

Every number is written as it is stored. What those classes cannot express is an error.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from alignvlm_jax import storage
from alignvlm_jax.config import LLMConfig, ModelConfig, VisionConfig
from alignvlm_jax.errors import UserError
from alignvlm_jax.weights import mapping
from alignvlm_jax.weights.mapping import Entry

COMPONENTS = ("llm", "vision", "connector")
SHARD_BYTES = 2 * 2**30

Read = Callable[[str], np.ndarray]
"""Reads one parameter by its path."""


def check(config: ModelConfig, components: Iterable[str]) -> None:
    """Raises UserError where a part cannot be expressed."""
    vision = config.vision
    if "vision" in components:
        for name in ("tile", "patch"):
            height = getattr(vision, f"{name}_height")
            width = getattr(vision, f"{name}_width")
            if height != width:
                others = ",".join(component for component in components if component != "vision")
                raise UserError(
                    "vision: a SiglipVisionModel has square tiles and patches; "
                    f"config.model.vision.{name}_height is {height} and {name}_width {width}; "
                    f"leave it out by --parts={others or 'llm,connector'}"
                )


def write(
    config: ModelConfig,
    stored: Mapping[str, jax.ShapeDtypeStruct],
    read: Read,
    folder: Path,
    components: Iterable[str],
) -> dict[str, int]:
    """Writes the parts of a model into `folder`, one parameter in memory at a time, and one shard
    of the output.

    Args:
      stored: shape and dtype of every parameter by path.

    Returns:
      The number of tensors written, by part.
    """
    writers = {
        "llm": lambda: (_llm_config(config.llm), mapping.llama(config.llm)),
        "vision": lambda: (_vision_config(config.vision), mapping.siglip()),
        "connector": lambda: (_connector_config(config), _connector_entries(stored)),
    }
    counts = {}
    for component in components:
        fields, entries = writers[component]()
        (folder / component).mkdir(parents=True)
        dtypes = {stored[entry.path].dtype for entry in entries}
        fields["torch_dtype"] = str(np.result_type(*dtypes))
        _write_json(folder / component / "config.json", fields)
        counts[component] = _write_tensors(folder / component, _published(entries, read))
    if "vision" in components:
        _write_json(folder / "vision" / "preprocessor_config.json", _preprocessor(config.vision))
    return counts


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's file, or all files of its folder."""
    for path in [source] if source.is_file() else sorted(source.iterdir()):
        storage.copy_file(path, folder / path.name)


def _published(entries: Iterable[Entry], read: Read) -> Iterator[tuple[str, np.ndarray]]:
    for entry in entries:
        array = read(entry.path)
        for name, view in zip(entry.names(array.shape), entry.views(array), strict=True):
            yield name, np.ascontiguousarray(view)


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> int:
    """Shards of at most SHARD_BYTES, or of one tensor; an index where there is more than one.

    Returns their number.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        # The number of shards, which their names hold, is known at the end.
        save_file(pending, folder / f"{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, array in tensors:
        if pending and sum(x.nbytes for x in pending.values()) + array.nbytes > SHARD_BYTES:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.tmp").rename(folder / "model.safetensors")
        return len(shards[0])
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (folder / f"{i}.tmp").rename(folder / file)
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return len(weight_map)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _llm_config(config: LLMConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        # We have no such limit: positions are computed. It only has to be no less than what is
        # asked for.
        "max_position_embeddings": int(scaling.original_length * scaling.factor),
    }
    if scaling.factor != 1.0:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return fields


def _vision_config(config: VisionConfig) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "image_size": config.tile_height,
        "patch_size": config.patch_height,
        "num_channels": 3,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": {"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[config.gelu],
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    }


def _preprocessor(config: VisionConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": config.tile_height, "width": config.tile_width},
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
    }


def _connector_config(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "alignvlm_jax_connector", "model": dataclasses.asdict(config)}


def _connector_entries(stored: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[Entry, ...]:
    """Our own names, with dots, and our own axes."""
    letters = "abcdefgh"
    return tuple(
        Entry(path, path.removeprefix("connector/").replace("/", "."), f"{axes} -> {axes}")
        for path, x in stored.items()
        if path.startswith("connector/")
        for axes in [letters[: len(x.shape)]]
    )
